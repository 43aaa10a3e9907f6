"""What `tfla export` writes, read by transformers' own classes."""

from pathlib import Path

import pytest
import torch
from peers import transformers, xLSTMForCausalLM

from tfla.integrations.text import export_run
from tfla.xlstm import XLSTM, XLSTMConfig
from tfla.xlstm.data import Codec

pytestmark = pytest.mark.peers


def test_transformers_reads_an_exported_run(tmp_path: Path) -> None:
    codec = Codec()
    config = XLSTMConfig(vocab_size=257, hidden_size=128, num_layers=2, num_heads=2)
    ours = XLSTM(config).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "gates" in name:
                parameter.normal_(std=0.3)
    folder = export_run(ours, codec, tmp_path / "out")
    theirs = xLSTMForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "größer 漢字 "
    found = tokenizer(text, return_tensors="pt")
    ids = found["input_ids"]
    assert ids.tolist() == [[codec.end, *text.encode()]]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    with torch.no_grad():
        want, have = ours(ids)[0], theirs(ids).logits
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    new = theirs.generate(**found, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert new.tolist() == ours.generate(ids, 20, temperature=0).tokens[0].tolist()
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == codec.end
