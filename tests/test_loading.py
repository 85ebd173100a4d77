"""Several processes get the weights of the first one, which alone reads the model, and export them file by file."""

import json
import os
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
import torch
import torch.distributed as dist
from families import FAMILIES, MULTIMODAL, save_model
from safetensors.torch import load_file, save_file
from test_family_table import REFUSED
from torch import Tensor, nn

from shared import UserError, export, loading
from shared.distributed import Ranks, unsharded

COMMON = ("llama", "qwen2", "gpt_neox", "gpt2", "mixtral", "gemma3")  # gpt2 has tied weights, gemma3 a vision part
OTHERS = [name for name in (*FAMILIES, *MULTIMODAL) if name not in COMMON and name not in REFUSED]


def in_two_processes(function: Any, folder: Path, *arguments: object) -> None:
    """Call function(ranks, *arguments) in two processes that share the weights."""
    processes = []
    for rank in range(2):
        process = harness.context.Process(target=_run, args=(rank, folder, function, arguments))
        process.start()
        processes.append(process)
    for rank, process in enumerate(processes):
        process.join(300)
        log = folder / f"error-{rank}"
        assert process.exitcode == 0, log.read_text() if log.exists() else f"rank {rank}: {process.exitcode}"


def _run(rank: int, folder: Path, function: Any, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    try:
        function(Ranks(rank, 2, torch.device("cpu"), torch.float32, 2), *arguments)
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    dist.barrier()
    os._exit(0)  # gloo's threads can abort an ordinary exit


def tensors_of(lm: nn.Module) -> dict[str, Tensor]:
    """All parameters under all their names, and all buffers, also those that no file holds."""
    return {**dict(lm.named_parameters(remove_duplicate=False)), **dict(lm.named_buffers())}


def compare_with_the_files(ranks: Ranks, models: list[Path]) -> None:
    for model in models:
        compare_model(ranks, model, model.with_name(f"exported-{model.name}"))


def compare_model(ranks: Ranks, model: Path, exported: Path) -> None:
    policy = loading.load_policy_from(str(model), ranks)
    plain = loading._load_lm(loading._Source(loading._policy_class(str(model)), str(model)))
    tensors = tensors_of(policy.lm)
    assert list(tensors) == list(tensors_of(plain))
    for name, tensor in tensors_of(plain).items():
        ours = unsharded(tensors[name].detach())
        assert torch.equal(ours.float(), tensor.detach()), name
    for part in policy.lm.modules():
        for name, value in vars(part).items():
            assert not (isinstance(value, Tensor) and value.is_meta), name
    tied = [name for name, tensor in tensors.items() if tensor is policy.lm.get_input_embeddings().weight]
    assert len(tied) == 1 + bool(plain.config.get_text_config().tie_word_embeddings)

    export.FILE_SIZE = 30_000
    export.export(policy, tiny.make_tokenizer(), exported, "", ranks)
    if ranks.is_main:
        index = json.loads((exported / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        again = loading._load_lm(loading._Source(loading._policy_class(str(exported)), str(exported)))
        for name, tensor in tensors_of(plain).items():
            assert torch.equal(tensors_of(again)[name], tensor), name


@pytest.mark.parametrize("names", [COMMON, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["common", "others"])
def test_two_processes_have_the_weights_of_the_files(names: Iterable[str], tmp_path: Path) -> None:
    """Buffers and ties too, and an export in several files gives them back."""
    models = [save_model(family, tmp_path / family) for family in names]
    in_two_processes(compare_with_the_files, tmp_path, models)


def head_of_a_new_reward_model(ranks: Ranks, model: Path, heads: Path) -> None:
    source = loading._Source(loading.REWARD_MODEL_CLASS, str(model), {"num_labels": 1}, new_tensor=loading.REWARD_HEAD)
    torch.manual_seed(ranks.rank)  # another head on each process, if each drew its own
    reward_model = loading._load(loading.RewardModel, source, ranks)
    torch.save(unsharded(reward_model.head.weight.detach()), heads / f"head-{ranks.rank}")


def test_a_new_reward_head_is_the_first_processs(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    in_two_processes(head_of_a_new_reward_model, tmp_path, tmp_path / "model", tmp_path)
    first, second = [torch.load(tmp_path / f"head-{rank}") for rank in range(2)]
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


def all_are_refused(ranks: Ranks, messages: dict[Path, str]) -> None:
    for model, message in messages.items():
        with pytest.raises(UserError, match=f"model {model}: .*{message}"):
            loading.load_policy_from(str(model), ranks)


def test_what_the_first_process_refuses_all_refuse(tmp_path: Path) -> None:
    messages = {
        save_model("llama", tmp_path / "missing"): "missing or misshapen",
        save_model("llama", tmp_path / "infinite"): "not finite",
        save_model("mamba", tmp_path / "mamba"): "recurrent",
    }
    tensors = load_file(tmp_path / "infinite" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, tmp_path / "infinite" / "model.safetensors", {"format": "pt"})
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "missing" / "model.safetensors", {"format": "pt"})

    in_two_processes(all_are_refused, tmp_path, messages)
