"""GGUF: one file with model, tokenizer and chat template, for llama.cpp and what is built on it.

Written with the `gguf` package from the merged model. Of the kinds of numbers those are offered that the package can round to;
the K-quants (Q4_K_M and the like) are llama.cpp's own `llama-quantize`, which takes the file in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from tune_magic.errors import TuneError
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.gguf_tokens import add_tokenizer
from tune_magic.exporters.limits import BRAIN, EIGHT_BITS, FIVE_BITS, FOUR_BITS, HALF
from tune_magic.exporters.parity import Reader, TorchReader
from tune_magic.models.generate import end_tokens
from tune_magic.models.load import quiet
from tune_magic.training.tuned import Tuned

FILE = "model.gguf"
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FREQUENCIES = "rope_freqs.weight"
_FEW_BITS = ("q4_0", "q4_1", "q5_0", "q5_1")


class GgufExporter(Exporter):
    """One file that llama.cpp, and what is built on it, runs."""

    quantizations: ClassVar = {
        "f16": HALF, "bf16": BRAIN, "q8_0": EIGHT_BITS, "q5_1": FIVE_BITS, "q5_0": FIVE_BITS, "q4_1": FOUR_BITS,
        "q4_0": FOUR_BITS,
    }  # fmt: skip

    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Write the file; float32 where nothing is said, so that it is the trained model and can be rounded later."""
        from gguf import GGUFWriter

        if tuned.objective.engine != "tokens" or tuned.objective.scores_rows:
            raise TuneError("Only runs that write texts are written as GGUF.", hint="Export it with `--to onnx`.")
        model = tuned.method.merge(tuned.model).cpu().eval()
        _check(model.config)
        writer = GGUFWriter(folder / FILE, _ARCHITECTURES[model.config.model_type])
        _add_sizes(writer, model.config, tuned.run.name or tuned.run.id)
        rows = model.get_input_embeddings().weight.shape[0]
        add_tokenizer(writer, tuned.tokenizer, rows, end_tokens(model, tuned.tokenizer))
        _add_tensors(writer, model, quantize or "f32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Read the file by Transformers, its numbers unpacked to float32."""
        return TorchReader(_read(folder), tuned, "Transformers")


def _check(config: Any) -> None:
    """Refuse what would be another model in llama.cpp, or could not be compared with the trained one.

    Raises:
        TuneError: With what it is.
    """
    hint = "Export it with `--to merged`; llama.cpp's own converter knows more families."
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise TuneError(
            f"Models of the family `{config.model_type}` are not written as GGUF; only {known} are.", hint=hint
        )
    own = {
        "biases beside its matrices": config.model_type != "qwen2"
        and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)),
        f"rotary positions of kind `{_rope(config)['rope_type']}`": _rope(config)["rope_type"] not in ("default", "llama3"),
        "layers that see a window of tokens only": config.model_type.startswith("qwen") and config.use_sliding_window,
        f"the activation `{config.hidden_act}`": config.hidden_act != "silu",
    }  # fmt: skip
    found = [what for what, is_so in own.items() if is_so]
    if found:
        raise TuneError(f"This model has {' and '.join(found)}, which is not written as GGUF.", hint=hint)


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **config.rope_parameters}


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_sizes(writer: Any, config: Any, name: str) -> None:
    """Add the model's sizes; one that sees a window of tokens (Mistral 0.1) ends where the window does."""
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_name(name)
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_vocab_size(config.vocab_size)


def _add_tensors(writer: Any, model: Any, quantize: str) -> None:
    from gguf import LlamaFileType, quants

    writer.add_file_type(LlamaFileType["ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"])
    if quantize not in ("f32", "f16", "bf16"):
        writer.add_quantization_version(2)
    for name, values in _tensors(model):
        kind = _kind(name, values, quantize, is_tied=_is_tied(model))
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)


def _kind(name: str, values: np.ndarray, quantize: str, *, is_tied: bool) -> Any:
    """Return the kind of numbers of a tensor, by llama.cpp's rules.

    Vectors stay float32; rows that are no multiple of a block stay float16; the matrix that gives the logits, where each error
    is an answer's, keeps 8 bits where the rest has fewer (llama.cpp's 6-bit kind is one that the package cannot round to).
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if values.ndim == 1 or quantize == "f32":
        return GGMLQuantizationType.F32
    gives_logits = name == ("token_embd.weight" if is_tied else "output.weight")
    kind = GGMLQuantizationType["Q8_0" if gives_logits and quantize in _FEW_BITS else quantize.upper()]
    return GGMLQuantizationType.F16 if values.shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _is_tied(model: Any) -> bool:
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def _tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the model's tensors by their names in the file, float32."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[config.model_type])
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and _is_tied(model):
            continue
        member = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if member is None:
            raise TuneError(f"GGUF has no place for {name}.", hint="Export it with `--to merged`.")
        values = tensor.detach().float().numpy()
        projection = name.rsplit(".", 2)[-2]
        if projection in heads and _ARCHITECTURES[config.model_type] == "llama":
            values = _side_by_side(values, heads[projection])
        yield member, np.ascontiguousarray(values)
    if _rope(config)["rope_type"] == "llama3":
        yield _FREQUENCIES, _slowed(model)


def _side_by_side(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Return rows of queries or keys, (heads * size, ...), as llama.cpp turns them.

    Transformers turns the first half of a head against the second, llama.cpp's llama each even row against the odd one after it.
    """
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return np.asarray(halves.swapaxes(1, 2).reshape(values.shape))


def _slowed(model: Any) -> np.ndarray:
    """Return by how much Llama 3 slows each frequency of its positions, (head size / 2,)."""
    config = model.config
    size = _head_size(config)
    plain = _rope(config)["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return np.asarray((plain / model.model.rotary_emb.inv_freq.double()).float().numpy())


def _read(folder: Path) -> Any:
    """Load a file's model, float32. Transformers overlooks two things, which are read here: head sizes and slowed positions."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = GGUFReader(folder / FILE)
    architecture = reader.get_field("general.architecture").contents()
    where: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
    with quiet():
        config = AutoConfig.from_pretrained(folder, **where)
        config.head_dim = reader.get_field(f"{architecture}.attention.key_length").contents()
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **where)
    for tensor in reader.tensors:
        if tensor.name == _FREQUENCIES:
            model.model.rotary_emb.inv_freq /= torch.from_numpy(np.array(tensor.data))
    return model
