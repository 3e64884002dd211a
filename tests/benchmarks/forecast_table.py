"""Tables of the memory forecast for the guide: ``python -m tests.benchmarks.forecast_table``.

The first two compare forecasts with what was measured here, on many small models with random
weights and on SmolLM2-135M; the third stands beside figures that others published for models that
do not fit this machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30

LLAMA_2_7B: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_2_13B: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
LLAMA_65B: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64
)
LLAMA_2_70B: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip
LLAMA_3_70B: dict[str, Any] = LLAMA_2_70B | {"vocab_size": 128256}
LLAMA_3_8B: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
LLAMA_32_3B: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A figure somebody published, and the settings it was published with.

    Attributes:
        model: what was trained.
        make: makes its config.
        adapter: fields of the adapter.
        settings: of ``nbpeft.forecast``.
        figure: what was published, in its own unit.
        source: where.
        remark: what is not published, or differs.
    """

    model: str
    make: Callable[[], Any]
    adapter: Mapping[str, Any]
    settings: Mapping[str, Any]
    figure: str
    source: str
    remark: str = ""
    task: str = field(default="CAUSAL_LM")


def _llama(values: Mapping[str, Any]) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**{"tie_word_embeddings": False, "max_position_embeddings": 131072, **values})

    return make


def _bloomz() -> Any:
    from transformers import BloomConfig

    return BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32, hidden_dropout=0.0)


def _t0() -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


LITGPT = "LitGPT, resource tables (A100 40 GB, 2023-10)"
LIT_REMARK = "another model code and LoRA; loss in pieces"
LIT_NF4_REMARK = f"{LIT_REMARK}; bitsandbytes 0.41 kept inputs of frozen layers (mended in 0.43.2)"
UNSLOTH = "Unsloth README, column Hugging Face + FA2: longest context on"
UNSLOTH_REMARK = "the GPU's size, not a peak; checkpointing, optimizer, double quantization and versions not published"
QV = ("q_proj", "v_proj")
BF16: dict[str, Any] = {"dtype": "bfloat16", "gradient_checkpointing": False}
NF4: dict[str, Any] = BF16 | {"quantization": "nf4"}


def _litgpt(name: str, values: Mapping[str, Any], batch: int, figure: str, **settings: Any) -> Published:
    sizes = BF16 | {"batch_size": batch, "max_length": 1304} | settings
    remark = LIT_NF4_REMARK if "quantization" in settings else LIT_REMARK
    return Published(name, _llama(values), {"r": 8, "target_modules": QV}, sizes, figure, LITGPT, remark)


def _unsloth(name: str, values: Mapping[str, Any], length: int, memory: str) -> Published:
    sizes = NF4 | {"max_length": length, "gradient_checkpointing": True, "optim": "adamw_8bit"}
    adapter = {"r": 32, "target_modules": "all-linear"}
    return Published(name, _llama(values), adapter, sizes, f"{memory} GPU", f"{UNSLOTH} {memory}", UNSLOTH_REMARK)


PUBLISHED: tuple[Published, ...] = (
    _litgpt("Llama 2 7B", LLAMA_2_7B, 1, "21.30 GB"),
    _litgpt("Llama 2 7B", LLAMA_2_7B, 2, "29.07 GB"),
    _litgpt("Llama 2 7B", LLAMA_2_7B, 1, "14.14 GB", quantization="nf4", double_quant=False),
    _litgpt("Llama 2 7B", LLAMA_2_7B, 1, "13.84 GB", quantization="nf4"),
    _litgpt("Llama 2 13B", LLAMA_2_13B, 1, "38.12 GB"),
    _litgpt("Llama 2 13B", LLAMA_2_13B, 1, "22.55 GB", quantization="nf4"),
    Published(
        "Llama 2 70B", _llama(LLAMA_2_70B), {}, NF4 | {"max_length": 2048, "training": False}, "37.21 GB",
        LITGPT, "inference; the length is not published",
    ),
    _unsloth("Llama 3.1 8B", LLAMA_3_8B, 932, "12 GB"),
    _unsloth("Llama 3.1 8B", LLAMA_3_8B, 2551, "16 GB"),
    _unsloth("Llama 3.1 8B", LLAMA_3_8B, 5789, "24 GB"),
    _unsloth("Llama 3.3 70B", LLAMA_3_70B, 6916, "80 GB"),
    Published(
        "LLaMA 65B", _llama(LLAMA_65B), {"r": 64, "target_modules": "all-linear", "lora_dropout": 0.05},
        NF4
        | {"batch_size": 4, "max_length": 528, "gradient_checkpointing": True, "optim": "paged_adamw_32bit"},
        "one 48 GB GPU", "QLoRA (arXiv 2305.14314); settings of its finetune_guanaco_65b.sh",
        "paged optimizer state may leave the GPU",
    ),
    Published(
        "Llama 3.2 3B", _llama(LLAMA_32_3B), {"r": 32, "target_modules": QV},
        BF16 | {"batch_size": 4, "max_length": 768},
        f"{22273851392 / GIB:.2f} GiB reserved", "PEFT, method_comparison/MetaMathQA, lora rank 32 (L40S)",
        "reserved, with evaluation in batches of 50; batches are padded to their longest, at most 768",
    ),
    Published(
        "bloomz 7B1", _bloomz, {"r": 8, "target_modules": ["query_key_value"], "lora_dropout": 0.1},
        {"dtype": "float32", "batch_size": 8, "max_length": 64}, "32 GB", "PEFT README (A100 80 GB)",
        "settings not published with it: those of PEFT's example, float32",
    ),
    Published(
        "T0 3B", _t0, {"r": 8, "target_modules": ["q", "v"], "lora_dropout": 0.1},
        {"dtype": "float32", "batch_size": 8, "max_length": 64}, "14.4 GB", "PEFT README (A100 80 GB)",
        "settings not published with it: batch of PEFT's example, float32, length assumed", task="SEQ_2_SEQ_LM",
    ),
)  # fmt: skip


def forecast_of(published: Published) -> Any:
    """Our forecast with the settings of a published figure."""
    from nbpeft import LoraConfig, forecast

    adapter = None
    if published.adapter:
        adapter = LoraConfig(task_type=published.task, **published.adapter)
    return forecast(published.make(), adapter, loss_chunk_size=0, **published.settings)  # as others compute losses


def words(settings: Mapping[str, Any], adapter: Mapping[str, Any]) -> str:
    """Settings as a person writes them."""
    kind = settings.get("quantization")
    stored = f"{kind}{'' if settings.get('double_quant', True) else ', no double quantization'}" if kind else ""
    targets = adapter.get("target_modules", ())
    where = targets if isinstance(targets, str) else " ".join(targets)
    parts = [
        "QLoRA" if kind and adapter else "LoRA" if adapter else "inference",
        f"r {adapter['r']} on {where}" if adapter else "",
        stored or settings["dtype"],
        f"batch {settings.get('batch_size', 1)}",
        f"length {settings['max_length']}",
        "checkpointing" if settings.get("gradient_checkpointing") else "",
        settings.get("optim", "adamw") if settings.get("training", True) else "",
    ]
    return ", ".join(part for part in parts if part)


def published_table(rows: Iterable[Published] = PUBLISHED) -> str:
    """Forecasts beside published figures, as Markdown."""
    lines = [
        "| Model | Settings | Published | Forecast | of it weights | Source | Remark |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        found = forecast_of(row)
        weights = sum(part.byte_count for part in found.parts if part.name == "base weights")
        unit, divisor = ("GiB", GIB) if "GiB" in row.figure else ("GB", 10**9)
        sizes = [f"{count / divisor:.2f} {unit}" for count in (found.peak_bytes, weights)]
        cells = (row.model, words(row.settings, row.adapter), row.figure, *sizes, row.source, row.remark)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracy_table(cases: Sequence[Mapping[str, Any]], errors: Sequence[float]) -> str:
    """Errors of forecasts by group, as Markdown.

    Args:
        cases: the settings.
        errors: of each, as shares of the measured peak.
    """
    names: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda case: "all",
        "shape": lambda case: str(case["shape"]),
        "dtype": lambda case: str(case["dtype"]).removeprefix("torch."),
        "stored": lambda case: str(case["quantization"] or "not quantized"),
        "step": lambda case: (
            "inference" if not case["training"] else "checkpointed" if case["gradient_checkpointing"] else "training"
        ),
    }
    lines = ["| Group | Combinations | Median error | Worst error |", "|---|---:|---:|---:|"]
    for title, name in names.items():
        groups: dict[str, list[float]] = {}
        for case, error in zip(cases, errors, strict=True):
            groups.setdefault(name(case), []).append(error)
        for group, found in sorted(groups.items()):
            label = f"{title}: {group}" if title else f"**{group}**"
            lines.append(f"| {label} | {len(found)} | {_percent(statistics.median(found))} | {_percent(max(found))} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.forecast_table", description=__doc__)
    parser.add_argument("--only", choices=("accuracy", "smollm2", "published"), help="one of the tables")
    parser.add_argument("--count", type=int, default=80, help="combinations that are measured (default: 80)")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = (arguments.only,) if arguments.only else ("accuracy", "smollm2", "published")
    if "accuracy" in wanted:
        from tests.memory.test_forecast_accuracy import combinations, errors_of

        cases = combinations(arguments.count)
        print("Peak bytes of a step: forecast against torch's allocator (CPU), random weights.\n")
        print(accuracy_table(cases, errors_of(cases)), end="\n\n")
    if "smollm2" in wanted:
        from tests.benchmarks import forecast_smollm2

        print("Peak of a step of SmolLM2-135M (CPU, LoRA on all linear layers): forecast and measurement.\n")
        print(forecast_smollm2.table(), end="\n\n")
    if "published" in wanted:
        print("Peak of a step on one GPU: published figures and our forecast for the same settings.\n")
        print(published_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
