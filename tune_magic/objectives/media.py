"""Classification of images and of recordings."""

from __future__ import annotations

import abc
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tune_magic.data.content import Content, Labelled, Media
from tune_magic.data.example import Example, Segment
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import ModelError
from tune_magic.models.load import load_head
from tune_magic.models.processor import Processor
from tune_magic.objectives.classify import Classify, ClassifyOptions

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from tune_magic.training.rows import RowStates

# what Pillow makes of damaged files, beside errors of the system
_DAMAGED = (SyntaxError, EOFError, struct.error, zlib.error, ArithmeticError, LookupError, TypeError, AttributeError)
_FRAMES_PER_SECOND = 50  # positions that a second of sound counts for


class ClassifyMedia(Classify):
    """Base of both: what is read is kept as bytes beside the rows, and prepared by the model's own processor."""

    engine: ClassVar[Literal["tokens", "rows", "outputs"]] = "outputs"
    kind: ClassVar[str]
    head: ClassVar[str]

    def __init__(self, *arguments: Any, **facts: Any) -> None:
        super().__init__(*arguments, **facts)
        self._processor: Processor | None = None

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take the classes of the training rows, as `classify` does."""
        super().learn((Labelled("", c.label) for c in contents if isinstance(c, Media)), source)

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Read each file and keep what the model's processor will prepare."""
        processor = renderer.tokenizer
        if not isinstance(processor, Processor):
            raise ModelError(f"The model reads texts, not {self.kind}s.", hint=f"Take a model of {self.kind}s.")
        numbers = {name: number for number, name in enumerate(self.classes)}
        found = []
        for content, place, index in zip(part.contents, part.places, part.numbers, strict=True):
            assert isinstance(content, Media)
            if content.label not in numbers:
                hint = f"Classes: {', '.join(self.classes)}."
                part.faults.add(place, "no training row has this class", content.label, hint=hint)
                continue
            try:
                media, length = self.prepared(content.source, processor)
            except (OSError, ValueError, RuntimeError) as error:
                part.faults.add(place, f"the {self.kind} cannot be read ({error})", _named(content.source))
                continue
            found.append(
                Example(
                    trunk=Segment(_stand_in(media, length), np.zeros(length, dtype=np.float32)),
                    question=_named(content.source), reference=content.label, index=index, media=media,
                    label=numbers[content.label],
                )
            )  # fmt: skip
        return found

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model with a new head of as many outputs as there are classes."""
        self._processor = Processor(folder)
        return load_head(folder, dtype, self.head, self.classes)

    def states(self, outputs: Any, examples: Sequence[Example]) -> RowStates:
        """Take the logits of each row."""
        import torch

        from tune_magic.training.rows import RowStates

        given = torch.tensor([example.label for example in examples], device=outputs.logits.device)
        return RowStates(outputs.logits.float(), given)

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Paths or bytes of files; images and arrays of samples too."""
        return [Media(self.kind, given, self.classes[0]) for given in inputs]

    @property
    def processor(self) -> Any:
        """Transformers' own, once the model is loaded."""
        assert self._processor is not None
        return self._processor.own

    @abc.abstractmethod
    def prepared(self, source: Any, processor: Processor) -> tuple[bytes, int]:
        """Return what is kept of a file, and the positions it counts for.

        Raises:
            OSError, ValueError, RuntimeError: It cannot be read.
        """


class ClassifyImageOptions(ClassifyOptions):
    """Keys of `objective: classify_image`."""

    name: Literal["classify_image"] = Field(  # type: ignore[assignment]
        "classify_image", description="Train a head that chooses the class of an image."
    )


class ClassifyImage(ClassifyMedia):
    """Minus the log-likelihood of each image's class."""

    Options = ClassifyImageOptions
    formats = ("image_label",)
    task = "IMAGE_CLS"
    kind = "image"
    head = "ImageClassification"
    summary = "A head learns to choose the class of an image."
    formula = "L = − (1 / n) Σ_i w_(y_i) (1 − p_i)^γ log p_i;  p_i = p(class of i | image i)"
    source = "Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, arXiv:2010.11929."
    when = "For rows of an image, a path or its bytes, and a class; with ViT, DeiT, ConvNeXT, ResNet and their kin."

    def prepared(self, source: Any, processor: Processor) -> tuple[bytes, int]:
        """The file's bytes, once it is known that they are an image."""
        try:
            media = _bytes_of_image(source)
            _image(media).load()
        except _DAMAGED as error:
            raise ValueError(f"it is damaged: {str(error) or type(error).__name__}") from None
        return media, processor.num_positions

    def batch(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, np.ndarray]:
        """Prepared pixels."""
        images = [_image(example.media or b"") for example in examples]
        return {"pixel_values": np.asarray(self.processor(images=images, return_tensors="np")["pixel_values"])}


class ClassifyAudioOptions(ClassifyOptions):
    """Keys of `objective: classify_audio`."""

    name: Literal["classify_audio"] = Field(  # type: ignore[assignment]
        "classify_audio", description="Train a head that chooses the class of a recording."
    )
    max_seconds: float = Field(10.0, gt=0, le=60, description="Longer recordings are cut at the end.")


class ClassifyAudio(ClassifyMedia):
    """Minus the log-likelihood of each recording's class.

    Every recording is brought to one length, that of the longest in the training rows, so that what a row gives does not
    depend on those beside it.

    Args:
        arguments: As of `Classify`.
        seconds: That length; learned from the training rows by `learn`.
        facts: As of `Classify`.
    """

    Options = ClassifyAudioOptions
    formats = ("audio_label",)
    task = "AUDIO_CLS"
    kind = "recording"
    head = "AudioClassification"
    summary = "A head learns to choose the class of a recording."
    formula = "L = − (1 / n) Σ_i w_(y_i) (1 − p_i)^γ log p_i;  p_i = p(class of i | recording i)"
    source = "Baevski et al. 2020, wav2vec 2.0, arXiv:2006.11477; Yang et al. 2021, SUPERB, arXiv:2105.01051."
    when = "For rows of a recording, a path or its bytes, and a class: spoken commands, speakers, sounds."

    def __init__(self, *arguments: Any, seconds: float = 0.0, **facts: Any) -> None:
        super().__init__(*arguments, **facts)
        self.seconds = seconds

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take the classes and the longest recording of the training rows."""
        super().learn(self._heard(contents), source)

    def facts(self) -> dict[str, Any]:
        """The classes, and the length in seconds."""
        return {**super().facts(), "seconds": self.seconds}

    def prepared(self, source: Any, processor: Processor) -> tuple[bytes, int]:
        """Samples at the model's rate, one channel, float32, cut or filled up with silence."""
        rate = int(processor.own.sampling_rate)
        samples = _at_rate(*_samples(source), rate)
        kept = np.zeros(max(1, round(self.seconds * rate)), dtype="<f4")
        kept[: min(len(samples), len(kept))] = samples[: len(kept)]
        return kept.tobytes(), max(1, math.ceil(self.seconds * _FRAMES_PER_SECOND))

    def batch(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, np.ndarray]:
        """Prepared samples, or the spectrogram that the model reads."""
        recordings = [np.frombuffer(example.media or b"", dtype="<f4") for example in examples]
        rate = int(self.processor.sampling_rate)
        given = self.processor(recordings, sampling_rate=rate, return_tensors="np")
        return {name: np.asarray(array) for name, array in given.items()}

    def _heard(self, contents: Iterable[Content]) -> Iterator[Content]:
        for content in contents:
            if isinstance(content, Media):
                try:
                    samples, rate = _samples(content.source)
                except (OSError, ValueError, RuntimeError):
                    samples, rate = np.empty(0, dtype=np.float32), 1  # `examples` will say so, with its place
                self.seconds = min(max(self.seconds, round(len(samples) / rate, 4)), self.options.max_seconds)
                yield content


def _bytes_of_image(source: Any) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        return Path(source).expanduser().read_bytes()
    if hasattr(source, "save"):  # an image of Pillow
        stream = io.BytesIO()
        source.save(stream, format="PNG")
        return stream.getvalue()
    raise ValueError(f"{type(source).__name__} is no image")


def _image(media: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(media)).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("it is no image that is known") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("it has more pixels than an image should") from None


def _samples(source: Any) -> tuple[np.ndarray, int]:
    """Return samples of one channel, (n,) float32, and their rate."""
    import soundfile

    if isinstance(source, dict) and "array" in source:
        return np.asarray(source["array"], dtype=np.float32), int(source["sampling_rate"])
    if not isinstance(source, bytes | str | Path):
        raise OSError(f"{type(source).__name__} is no recording")
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser().open("rb")
    with file:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return samples.mean(axis=1), int(rate)


def _at_rate(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return samples at another rate, by a polyphase filter."""
    from scipy.signal import resample_poly

    shared = math.gcd(rate, wanted)
    return samples if rate == wanted else np.asarray(resample_poly(samples, wanted // shared, rate // shared))


def _stand_in(media: bytes, length: int) -> np.ndarray:
    """Return tokens that stand for a file where rows are compared: the same for equal files alone, (length,) int32."""
    digest = hashlib.shake_256(media).digest(4 * length)
    return (np.frombuffer(digest, dtype="<u4") >> 1).astype(np.int32)


def _named(source: Any) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return f"{len(source)} bytes" if isinstance(source, bytes) else type(source).__name__
