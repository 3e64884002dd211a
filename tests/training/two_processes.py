"""What each of two processes runs: python -m torch.distributed.run --nproc_per_node 2 this.py FOLDER."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nbpeft.training import Run, RunCallback, Trainer, start_run
from nbpeft.training.disk.checkpoints import resume_point
from tests.tiny_models import VOCABULARY
from tests.training.support import trainable, weights


def batches(count: int = 6, rows: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCABULARY, (rows, 8), generator=generator) for _ in range(count)]


def own_loop(rank: int, world: int) -> dict[str, Any]:
    """Losses and weights of a loop over shards of each batch; alone, over whole batches."""
    model = trainable(lora_dropout=0.0)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.manager.parameters("default"), lr=0.5)
    with start_run(model, total_steps=6) as run:
        for batch in batches():
            shard = batch.chunk(world)[rank]
            loss = wrapped(input_ids=shard, labels=shard).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)
    return {name: tensor.double().sum().item() for name, tensor in weights(model).items()}


def sharded_loop(use_dora: bool) -> list[float]:
    """Losses of a loop whose decoder layers are sharded over the processes."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = trainable(use_dora=use_dora)
    if distributed.is_initialized():
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        assert any(isinstance(parameter, DTensor) for parameter in model.manager.parameters("default"))
    optimizer = torch.optim.SGD(model.manager.parameters("default"), lr=0.5)
    losses = []
    for batch in batches():
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trainer(rank: int, folder: Path) -> dict[str, Any]:
    """A Trainer in both processes; the second one is asked to stop."""
    from transformers import TrainingArguments

    model = trainable()
    run = Run(model, 50)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=2,
        max_steps=50,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": batch[0].tolist(), "labels": batch[0].tolist()} for batch in batches(64)]

    class StopAfterFive(RunCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 1 and state.global_step == 5:
                run.control.request_stop()
            super().on_step_end(args, state, control, **kwargs)

    trained = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[StopAfterFive(run)])
    trained.train()
    trained.save_model(str(folder / "adapter"))
    distributed.barrier()
    if rank == 0:
        for checkpoint in (folder / "trainer").glob("checkpoint-[45]"):
            (checkpoint / "trainer_state.json").write_text("{")
    distributed.barrier()
    return {
        "resumes": Path(resume_point(trained, True)).name,
        "steps": trained.state.global_step,
        "weights": {k: v.double().sum().item() for k, v in weights(model).items()},
    }


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    result = {
        "loop": own_loop(rank, world),
        "sharded": [sharded_loop(use_dora) for use_dora in (False, True)],
        "trainer": trainer(rank, folder),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of torch that still wait would abort a normal exit


if __name__ == "__main__":
    main()
