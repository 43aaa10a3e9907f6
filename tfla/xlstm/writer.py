"""Text in, text out, streaming: a checkpoint with its codec, for the command and for a program."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tfla.xlstm import checkpoint
from tfla.xlstm.arguments import integer
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.data import Codec, Decoder
from tfla.xlstm.generate import Stream
from tfla.xlstm.model import XLSTM
from tfla.xlstm.run import Base, check_vocabulary


class Writer:
    """A model and the codec it was trained with.

    `begin` are the ids before every text and `stop` those that end one, by default the codec's id
    that ends a document, for both. `context` is the number of tokens in a window of its training,
    where that is known.

    Example:
        writer = load_writer(Path("runs/train"))
        print("".join(writer.write(b"def main(", 200, temperature=0.7, seed=0)))
    """

    def __init__(
        self,
        model: XLSTM,
        codec: Codec,
        begin: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        context: int | None = None,
    ) -> None:
        self.model, self.codec, self.context = model.eval(), codec, context
        self.begin = [codec.end] if begin is None else list(begin)
        self.stop = [codec.end] if stop is None else list(stop)

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
        `stop`; a character that is cut there is U+FFFD. One that `prompt` ends within comes first,
        in whole. `seed` None draws another one each time. RunError when an argument is out of
        range, when the model's logits are not finite, or when the prompt cannot be encoded;
        TypeError when an argument is of another kind.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        return Dialogue(self, sampling).say(prompt, tokens, stop)


class Sampling(NamedTuple):
    """How tokens are drawn; see ``tfla.xlstm.sample``. seed None: another one each time."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


class Dialogue:
    """A text that somebody and a model write by turns; the model reads each part once.

    Example:
        dialogue = Dialogue(load_writer(Path("runs/train")), Sampling(temperature=0.7))
        print("".join(dialogue.say(b"def main(", 200)))
        print("".join(dialogue.say(b" class ", 200)))     # knows of main
    """

    def __init__(self, writer: Writer, sampling: Sampling) -> None:
        self.writer, self.sampling = writer, sampling
        seed = sampling.seed
        try:
            seed = None if seed is None else integer("seed", seed, 0, 2**63 - 1)
        except ValueError:
            raise RunError(f"--seed is {seed}; it must be from 0 to 2^63 - 1") from None
        device = writer.model.embedding.weight.device
        self._random = torch.Generator(device)
        self._random.manual_seed(torch.seed() % 2**63 if seed is None else seed)
        self._stream: Stream | None = None

    def say(self, text: bytes, tokens: int, stop: Iterable[str] = ()) -> Iterator[str]:
        """Read `text`, after all that was read and written before it, and go on; see
        ``Writer.write``. After the end of a document the next one begins with an empty state."""
        if not isinstance(text, (bytes, bytearray)):
            raise TypeError(f"prompt must be bytes; got {type(text).__name__}.")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if others := [word for word in stops if not isinstance(word, str)]:
            raise TypeError(f"stop must hold texts; got {others[0]!r}.")
        if "" in stops:
            raise RunError("--stop is empty; give the text to stop at")
        try:
            tokens = integer("tokens", tokens, 1, 2**63 - 1)
        except ValueError:
            raise RunError(f"--tokens is {tokens}; it must be at least 1") from None
        writer, before = self.writer, self._stream
        codec, (temperature, top_k, top_p, _) = writer.codec, self.sampling
        goes_on = before is not None and not bool(before.finished.any())
        # What the state has not read yet: the last token that was drawn.
        first = before.last.tolist() if before is not None and goes_on else writer.begin
        ids = [*first, *codec.encode(bytes(text)).tolist()]
        if not ids:
            raise RunError("the model has no id that begins a text; give it a prompt")
        try:
            stream = writer.model.stream(
                torch.tensor([ids], device=writer.model.embedding.weight.device),
                tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=self._random,
                stop=writer.stop or None,
                state=before.state if before is not None and goes_on else None,
            )
        except (TypeError, ValueError, FloatingPointError) as error:
            raise RunError(str(error).rstrip(".")) from error
        self._stream = stream
        decoder = codec.decoder(codec.unfinished(bytes(text)))
        return _until(_texts(stream, decoder, writer.stop), stops)


def load(
    path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> XLSTM:
    """Read a trained model, in eval mode.

    Args:
        path: the folder of a run, one checkpoint in it, or a folder in transformers' format, with
            config.json.
        device: where to put it; None: the CPU.
        dtype: of its parameters; None: what they were saved in.

    Returns:
        The model.

    Raises:
        TypeError: `dtype` is no floating dtype.
        tfla.errors.RunError: a run has no checkpoint, or a file of it is missing or damaged; the
            message names the file. For a folder in transformers' format: see
            ``tfla.integrations.load_xlstm``.

    Example:
        >>> from tfla.xlstm import load
        >>> model = load("runs/train", "cuda", torch.bfloat16)             # doctest: +SKIP
    """
    folder = Path(path)
    if not isinstance(dtype, torch.dtype | None) or (dtype and not dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None; got {dtype!r}.")
    if is_transformers_folder(folder):
        from tfla.integrations import load_xlstm

        return load_xlstm(folder, device=device or "cpu", dtype=dtype).eval()
    saved = checkpoint.load(folder)
    model = XLSTM(saved.config())
    saved.restore(model)
    return model.to(device=device or "cpu", dtype=dtype).eval()


def load_writer(path: Path, device: torch.device | str = "cpu") -> Writer:
    """The model in `path`, a run's folder, a checkpoint, or a folder in transformers' format that
    holds a tokenizer.json; RunError names a damaged file."""
    if is_transformers_folder(path):
        from tfla.integrations import load_xlstm
        from tfla.integrations.text import read_text_side

        try:
            model = load_xlstm(path, device=device)
        except (ValueError, OSError) as error:
            raise RunError(str(error).rstrip(".")) from error
        text = read_text_side(path, model.config.vocab_size)
        return Writer(model, text.codec, text.begin, text.stop)
    saved, base = _read_saved(path)
    with torch.device("cpu"):  # where the file is read, whatever torch's default device is
        model = XLSTM(base.config)
    saved.restore(model)
    options = saved.meta.get("options")
    context = options.get("context") if isinstance(options, dict) else None
    known = context if type(context) is int and 1 <= context < 2**31 else None
    return Writer(model.to(device), base.codec, context=known)


def read_base(path: Path) -> Base:
    """What a run may start from: `path` as ``load_writer`` takes it."""
    if not is_transformers_folder(path):
        return _read_saved(path)[1]
    writer = load_writer(path)
    if not writer.stop:
        raise RunError(
            f"{path} names no eos_token_id, so nothing can end a document; set it in config.json"
        )
    return Base(path, path, writer.model.config, writer.codec)


def _read_saved(path: Path) -> tuple[checkpoint.Checkpoint, Base]:
    saved = checkpoint.load(path)
    config, codec = saved.config(), Codec(saved.text("tokenizer.json"), saved.end())
    check_vocabulary(saved, config, codec)
    return saved, Base(path, saved.path, config, codec)


def is_transformers_folder(path: Path) -> bool:
    """Whether `path` is a folder in transformers' format, and neither a run nor a checkpoint."""
    ours = os.path.lexists(path / "checkpoint.json") or checkpoint.exists(path)
    return not ours and (path / "config.json").is_file()


def _texts(stream: Iterable[torch.Tensor], decoder: Decoder, stop: Sequence[int]) -> Iterator[str]:
    try:
        for token in stream:
            if int(token) not in stop:
                yield decoder.next(int(token))
    except FloatingPointError as error:
        raise RunError(str(error).rstrip(".")) from error
    yield decoder.rest()


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
