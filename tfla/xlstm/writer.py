"""Text in, text out, streaming: a checkpoint with its codec, for the command and for a program."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from tfla.xlstm import checkpoint
from tfla.xlstm.arguments import integer
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.data import Codec
from tfla.xlstm.model import XLSTM
from tfla.xlstm.run import check_vocabulary


class Writer:
    """A model and the codec it was trained with.

    Example:
        writer = load_writer(Path("runs/train"))
        print("".join(writer.write(b"def main(", 200, temperature=0.7, seed=0)))
    """

    def __init__(self, model: XLSTM, codec: Codec) -> None:
        self.model, self.codec = model.eval(), codec

    def write(
        self,
        prompt: bytes,
        tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Iterable[str] = (),
    ) -> Iterator[str]:
        """The continuation of `prompt` piece by piece, each as soon as its characters are whole.

        It ends after `tokens` tokens, at the end of the document, or before the first text of
        `stop`. `seed` None draws another one each time. RunError when an argument is out of range,
        when the model's logits are not finite, or when the prompt cannot be encoded; TypeError when
        an argument is of another kind.
        """
        if not isinstance(prompt, (bytes, bytearray)):
            raise TypeError(f"prompt must be bytes; got {type(prompt).__name__}.")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if others := [text for text in stops if not isinstance(text, str)]:
            raise TypeError(f"stop must hold texts; got {others[0]!r}.")
        if "" in stops:
            raise RunError("--stop is empty; give the text to stop at")
        try:
            tokens = integer("tokens", tokens, 1, 2**63 - 1)
        except ValueError:
            raise RunError(f"--tokens is {tokens}, wanted at least 1") from None
        try:
            seed = None if seed is None else integer("seed", seed, 0, 2**63 - 1)
        except ValueError:
            raise RunError(f"--seed is {seed}, wanted from 0 to 2^63 - 1") from None
        ids = [self.codec.end, *self.codec.encode(prompt).tolist()]
        try:
            stream = self.model.stream(
                torch.tensor([ids], device=self.model.embedding.weight.device),
                tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=torch.seed() % 2**63 if seed is None else seed,
                stop=self.codec.end,
            )
        except (TypeError, ValueError, FloatingPointError) as error:
            raise RunError(str(error).rstrip(".")) from error
        decode = self.codec.decoder()
        return _until((decode(token) for token in _numbers(stream)), stops)


def load(
    path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> XLSTM:
    """The model in `path`, ready to write (in eval mode).

    path: the folder of a run, one checkpoint in it, or a folder in transformers' format, with
    config.json. device: where to put it, None is the CPU. dtype: of its parameters; None: what they
    were saved in. Whatever is missing or damaged is an error that names the file: RunError for a
    run, see ``tfla.integrations.load_xlstm`` for transformers' format.

    Example:
        >>> from tfla.xlstm import load
        >>> model = load("runs/train", "cuda", torch.bfloat16)             # doctest: +SKIP
    """
    folder = Path(path)
    if not isinstance(dtype, torch.dtype | None) or (dtype and not dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None; got {dtype!r}.")
    ours = (folder / "checkpoint.json").exists() or checkpoint.exists(folder)
    if not ours and (folder / "config.json").is_file():
        from tfla.integrations import load_xlstm

        return load_xlstm(folder, device=device or "cpu", dtype=dtype).eval()
    saved = checkpoint.load(folder)
    model = XLSTM(saved.config())
    saved.restore(model)
    return model.to(device=device or "cpu", dtype=dtype).eval()


def load_writer(path: Path, device: torch.device | str = "cpu") -> Writer:
    """The model in `path`, a run's folder or a checkpoint; RunError names a damaged file."""
    saved = checkpoint.load(path)
    config, codec = saved.config(), Codec(saved.text("tokenizer.json"))
    check_vocabulary(saved, config, codec)
    with torch.device("cpu"):  # where the file is read, whatever torch's default device is
        model = XLSTM(config)
    saved.restore(model)
    return Writer(model.to(device), codec)


def _numbers(stream: Iterable[torch.Tensor]) -> Iterator[int]:
    try:
        for token in stream:
            yield int(token)
    except FloatingPointError as error:
        raise RunError(str(error).rstrip(".")) from error


def _until(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """Pass the pieces on until a stop text appears; what could still become one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in map(held.find, stops) if at >= 0]
        if found:
            yield held[: min(found)]
            return
        keep = max(
            (n for text in stops for n in range(1, len(text)) if held.endswith(text[:n])), default=0
        )
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held
