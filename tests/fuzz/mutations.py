"""What a stranger may do to the folder of an adapter. Each change is drawn from a random generator."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tests.fuzz.starts import CONFIG, LEGACY, WEIGHTS

PATTERNS = (
    *(r"(\w+\.?)+!", r"(a|a)*b", r"(.*)*x", r".*.*.*.*.*.*.*x", r"(.*)\1$", r"([a-z_]+)*$", r"(x+x+)+y"),
    *(
        "a{99999999999}",
        "(" * 3000,
        "(?i)Q",
        "[",
        "",
        "*",
        r"^model\.(\w+\.)*q_proj$",
        r"(?!.*1).*q_proj",
        "q_proj|" * 500,
    ),
)
NUMBERS = (0, -1, 1, 3, 2**24, 2**31, 2**63, 10**300, 1.5, -0.0, 1e308, 1e-308, 16, 4096)
TEXTS = (
    "",
    "no",
    "false",
    "8",
    "all-linear",
    "default",
    "é\ud7ff",
    "a" * 5000,
    "../x",
    "q_proj",
    "CAUSAL_LM",
    "\n`x`\n",
)
FIELDS = (
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("trainable_token_indices", "use_dora", "lora_bias", "runtime_config", "task_type", "peft_type", "auto_mapping"),
    *("base_model_name_or_path", "revision", "inference_mode", "megatron_config", "loftq_config", "eva_config"),
    *("layer_replication", "target_parameters", "ensure_weight_tying", "peft_version", "use_qalora", "arrow_config"),
)

Fields = dict[str, Any]
Tensors = dict[str, Tensor]
Draw = random.Random


def hostile_value(draw: Draw, depth: int = 0) -> Any:
    """Any JSON value, with a liking for those that hurt."""
    kind = draw.randrange(12 if depth < 3 else 5)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return draw.choice(TEXTS)
    if kind == 2:
        return draw.choice(PATTERNS)
    if kind in (3, 4):
        return draw.choice(
            (True, False, None, "pissa_niter_9999999999", "pissa_niter_7", "pissa", "olora", float("nan"))
        )
    if kind in (5, 6):
        return {draw.choice((*TEXTS, *PATTERNS)): hostile_value(draw, depth + 1) for _ in range(draw.randrange(4))}
    if kind == 7:
        return [f"name_{index}" for index in range(draw.choice((20, 3000, 30_000)))]
    if kind == 8:
        return {f"name_{index}": draw.choice((1, "x")) for index in range(draw.choice((20, 3000, 30_000)))}
    if kind == 9:
        return {rf"n{index}.*x": 2 for index in range(draw.choice((20, 3000)))}
    return [hostile_value(draw, depth + 1) for _ in range(draw.randrange(4))]


# The config


def change_field(draw: Draw, fields: Fields) -> None:
    fields[draw.choice((*FIELDS, *sorted(fields)))] = hostile_value(draw)


def likely_field(draw: Draw, fields: Fields) -> None:
    """A value of about the right kind."""
    name, value = draw.choice(
        (
            ("target_modules", draw.choice(PATTERNS)),
            ("target_modules", ["q_proj", draw.choice((*TEXTS, *PATTERNS))]),
            ("exclude_modules", draw.choice(PATTERNS)),
            ("rank_pattern", {draw.choice(PATTERNS): draw.choice(NUMBERS)}),
            ("alpha_pattern", {draw.choice(PATTERNS): draw.choice(NUMBERS)}),
            ("layers_pattern", draw.choice(PATTERNS)),
            ("layers_to_transform", draw.choice(([[1]], 1.5, [0, 10**9], -1, [], "1"))),
            ("r", draw.choice(NUMBERS)),
            ("lora_alpha", draw.choice(NUMBERS)),
            ("modules_to_save", [draw.choice(("embed_tokens", "layers", "q_proj", "norm", "nothing", ""))]),
            (
                "trainable_token_indices",
                draw.choice(([39, 40], [-1], [1, 1], {"lm_head": [3]}, {"norm": [0]}, [10**9])),
            ),
            ("bias", draw.choice(("all", "lora_only", "invalid"))),
            ("init_lora_weights", draw.choice(("pissa", "olora", "orthogonal", "pissa_niter_128", "gaussian"))),
            ("auto_mapping", {"parent_library": draw.choice(("transformers", "os", "")), "base_model_class": "system"}),
            ("base_model_name_or_path", draw.choice(("/nowhere", "", "a/b/c", "/dev/null", "x" * 3000, "é"))),
        )
    )
    fields[name] = value
    if name == "layers_pattern":
        fields.setdefault("layers_to_transform", [0])
    if name == "auto_mapping":
        fields["task_type"] = None


def drop_field(draw: Draw, fields: Fields) -> None:
    fields.pop(draw.choice(list(fields)), None)


def unknown_fields(draw: Draw, fields: Fields) -> None:
    fields.update({f"{'x' * draw.choice((1, 5000))}{n}": hostile_value(draw, 2) for n in range(draw.choice((1, 30)))})


def flip_truths(draw: Draw, fields: Fields) -> None:
    for name in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"):
        fields[name] = draw.choice((True, "no", "false", 0, 1, None, []))


# The text of the config


def damaged_text(draw: Draw, text: str) -> bytes:
    data = text.encode()
    kind = draw.randrange(9)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind == 1:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    if kind == 2:
        return b'{"peft_type": "LORA", "r": ' + b"9" * draw.choice((10, 5000)) + b"}"
    if kind == 3:
        depth = draw.choice((40, 500, 100_000))
        return b'{"peft_type": "LORA", "auto_mapping": ' + b"[" * depth + b"]" * depth + b"}"
    if kind == 4:
        return b"\xef\xbb\xbf" + data
    if kind == 5:
        return draw.choice((b"", b"null", b"[]", b'"x"', b"7", b"{}"))
    if kind == 6:
        return data.replace(b"{", b'{"r": 2, "r": 9, ', 1)
    if kind == 7:
        return b'{"peft_type": "LORA", "target_modules": [' + b",".join([b'"a"'] * 400_000) + b"]}"
    place = draw.randrange(len(data))
    return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]


# The tensors


def _key(draw: Draw, tensors: Tensors) -> str:
    return draw.choice(sorted(tensors, key=str)) if tensors else "x"


def drop_tensor(draw: Draw, tensors: Tensors) -> None:
    tensors.pop(_key(draw, tensors), None)


def rename_key(draw: Draw, tensors: Tensors) -> None:
    key = _key(draw, tensors)
    new = draw.choice(
        (key[1:], f"base_model.model.{key}", key.upper(), "x" * 100_000, "", f"{key}.weight", "a." * 3000)
    )
    tensors[new] = tensors.pop(key, torch.zeros(1))


def extra_keys(draw: Draw, tensors: Tensors) -> None:
    for number in range(draw.choice((1, 3000))):
        tensors[f"base_model.model.extra.{number}.lora_A.weight"] = torch.zeros(1)


def other_shape(draw: Draw, tensors: Tensors) -> None:
    shape = draw.choice(((), (0,), (1,), (4, 16), (16, 4), (3, 16), (1,) * 40, (2, 2, 2)))
    tensors[_key(draw, tensors)] = torch.zeros(shape)


def other_dtype(draw: Draw, tensors: Tensors) -> None:
    key = _key(draw, tensors)
    kinds = (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float64, torch.float16, torch.float8_e5m2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors[key] = tensors.get(key, torch.zeros(1)).to(draw.choice(kinds))


def not_finite(draw: Draw, tensors: Tensors) -> None:
    key = _key(draw, tensors)
    if key in tensors and tensors[key].numel() and tensors[key].is_floating_point():
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] = draw.choice((float("nan"), float("inf"), 1e38))


def tensors_of_the_base(draw: Draw, tensors: Tensors) -> None:
    for name in draw.sample(("embed_tokens", "embed_tokens.base_layer", "lm_head"), 2):
        path = name if name == "lm_head" else f"model.{name}"
        tensors[f"base_model.model.{path}.weight"] = torch.full((40, 16), draw.choice((0.0, 1.0, float("nan"))))


# The file of the tensors


def damaged_file(draw: Draw, data: bytes) -> bytes:
    kind = draw.randrange(8)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind == 1:
        place = draw.randrange(8 + length)
        return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return struct.pack("<Q", draw.choice((0, 2**63, length + 1, 2**40))) + data[8:]
    entry = header[draw.choice([key for key in header if key != "__metadata__"] or ["__metadata__"])]
    if kind == 3:
        entry["dtype"] = draw.choice(("F8_E8M0", "F4", "F6_E2M3", "I4", "X", 5))
    elif kind == 4:
        entry["shape"] = draw.choice(([2**40, 2**40], [-1], [0], "x", [1.5], []))
    elif kind == 5:
        entry["data_offsets"] = draw.choice(([0, 2**50], [5, 1], [-1, 3], [0], None))
    elif kind == 6:
        header["__metadata__"] = draw.choice((None, {}, [], {"a": 1}, {"nbpeft.base.shapes": "{"}))
    else:
        told = header.setdefault("__metadata__", {})
        told["nbpeft.base.shapes"] = draw.choice(
            ('{"1v x 4": 3}', '{"4 x 4": "x"}', "[[]]", "[" * 5000, '{"": 1}', "7")
        )
        told.setdefault("nbpeft.base.architecture", "A" * draw.choice((1, 100_000)))
        told.setdefault("nbpeft.base.dtype", "float32")
        told.setdefault("nbpeft.base.weights", "0")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


class Marks:
    """Unpickled, it would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def legacy_file(draw: Draw, tensors: Tensors, path: Path) -> None:
    """A ``.bin`` with what only such a file can hold."""
    key = _key(draw, tensors)
    tensor = tensors.get(key, torch.zeros(2, 2))
    held: Any = dict(tensors)
    kind = draw.randrange(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == 0 and tensor.dim():
            held[key] = tensor.to_sparse()
        elif kind == 1 and tensor.dtype == torch.float32:
            held[key] = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
        elif kind == 2:
            held[key] = tensor.to("meta")
        elif kind == 3:
            held = {number: value for number, value in enumerate(held.values())}
        elif kind == 4:
            held[key] = draw.choice((None, 3, [tensor], {"x": tensor}, "text"))
        elif kind == 5:
            held = draw.choice((list(held.values()), tensor, {}, None))
        elif kind == 6:
            path.write_bytes(pickle.dumps(Marks(path.parent / "executed")))
            return
        elif kind == 7:
            path.write_bytes(bytes(draw.randrange(256) for _ in range(draw.randrange(1, 300))))
            return
        elif kind == 8 and tensor.dim() == 2:
            held[key] = tensor.t()
        torch.save({**held, "evil": Marks(path.parent / "executed")} if kind == 9 else held, path)
    if draw.random() < 0.3:
        data = bytearray(path.read_bytes())
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data))


# The folder


def odd_folder(draw: Draw, folder: Path) -> None:
    name = draw.choice([path.name for path in folder.iterdir()])
    path = folder / name
    kind = draw.randrange(9)
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        path.symlink_to("/nowhere")
    elif kind == 6:
        path.symlink_to("/etc/hostname")
    elif kind == 7:
        (folder / ".nbpeft-0123456789abcdef").mkdir()
        (folder / ".nbpeft-0123456789abcdef" / CONFIG).write_bytes(draw.choice((b"", b"{}", b"\xff")))


CONFIG_CHANGES: tuple[Callable[[Draw, Fields], None], ...] = (
    *(change_field, change_field, likely_field, likely_field, likely_field, drop_field, unknown_fields, flip_truths),
)
TENSOR_CHANGES: tuple[Callable[[Draw, Tensors], None], ...] = (
    *(drop_tensor, rename_key, extra_keys, other_shape, other_dtype, not_finite, tensors_of_the_base),
)


def mutated(start: Path, folder: Path, draw: Draw) -> list[str]:
    """Writes a damaged copy of an adapter; returns what was done to it."""
    folder.mkdir()
    fields = json.loads((start / CONFIG).read_text())
    legacy = (start / LEGACY).exists()
    tensors = torch.load(start / LEGACY) if legacy else safetensors.torch.load_file(start / WEIGHTS)
    done = [start.name]
    for _ in range(draw.choice((0, 1, 1, 2))):
        change = draw.choice(CONFIG_CHANGES)
        change(draw, fields)
        done.append(change.__name__)
    for _ in range(draw.choice((0, 0, 1, 1, 2))):
        alter = draw.choice(TENSOR_CHANGES)
        alter(draw, tensors)
        done.append(alter.__name__)
    text = json.dumps(fields)
    damaged = draw.random() < 0.15
    (folder / CONFIG).write_bytes(damaged_text(draw, text) if damaged else text.encode())
    if legacy or draw.random() < 0.15:
        legacy_file(draw, tensors, folder / LEGACY)
        done.append("legacy_file")
    else:
        data = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"})
        broken = draw.random() < 0.2
        (folder / WEIGHTS).write_bytes(damaged_file(draw, data) if broken else data)
        done += ["damaged_file"] if broken else []
    if draw.random() < 0.1:
        odd_folder(draw, folder)
        done.append("odd_folder")
    return done + (["damaged_text"] if damaged else [])
