"""Policies: loading, the packed forward pass, reference log-probs computed once, and the final Hugging Face model."""

import gc
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared import UserError, writing
from shared.attention import NAME, skip_unread, span_attention
from shared.data import Batch, Batches, Groups, cache_directory, is_whole, read_tensors, write_tensors
from shared.distributed import Place, all_sum, from_main, inference, shard
from shared.logprobs import sequence_logps, token_logps
from shared.rows import first_line


class Packed(nn.Module):
    """A Hugging Face model over packed micro-batches.

    All of it happens inside one forward call of the root module: FSDP2 gathers the embedding and the head there.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def states(self, batch: Batch, read: Tensor) -> Tensor:
        """→ (R, H), the last hidden states at the positions `read` (R,) of the packed row, each given once."""
        if torch.is_grad_enabled():
            self.before(batch.last)
        batch.spans.read = read
        found = self.lm.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, spans=batch.spans, use_cache=False
        )
        return found.last_hidden_state[0].index_select(0, read)


class Policy(Packed):
    """π_θ(y|x) of a causal language model."""

    def forward(self, batch: Batch) -> Tensor:
        """→ (N,) float32, log π of each completion token given all before it in its own completion."""
        head = self.lm.get_output_embeddings()
        states = self.states(batch, batch.read).index_select(0, batch.sources)
        return token_logps(states, head.weight, head.bias, batch.targets)

    def logps(self, batch: Batch) -> Tensor:
        """→ (B, K), log π(y|x) of each completion: the sum over its tokens."""
        return sequence_logps(self(batch), batch.lengths)

    def plain(self, prompt: Tensor, completion: Tensor) -> Tensor:
        """log π(y|x) by the stock forward pass, to check the packed one against."""
        logits = self.lm(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, completion[:, None]).sum()


class RewardModel(Packed):
    """r(x, y) of a sequence classifier with one label: its head's value at the completion's last token."""

    def forward(self, batch: Batch) -> Tensor:
        """→ (B, K) float32."""
        states = self.states(batch, batch.ends.flatten())
        values = torch.nn.functional.linear(states.float(), self.lm.score.weight.float())
        return values.view(batch.ends.shape).clone()  # FSDP2's hooks need a tensor that is no view

    def plain(self, prompt: Tensor, completion: Tensor) -> Tensor:
        """r(x, y) by the stock forward pass."""
        return self.lm(input_ids=torch.cat([prompt, completion])[None]).logits[0, 0]


def load_tokenizer(path: str, reference: str | None = None):
    """The tokenizer and the configuration of a model directory or hub id; a reference must share both vocabularies."""
    from transformers import AutoConfig, AutoTokenizer

    found = []
    for name in filter(None, (path, reference)):
        try:
            found += [auto.from_pretrained(name, trust_remote_code=False) for auto in (AutoTokenizer, AutoConfig)]
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistakes
            raise _unloadable(name, error) from None
    tokenizer, config, *other = found
    if other and (other[0].get_vocab() != tokenizer.get_vocab() or other[1].vocab_size != config.vocab_size):
        raise UserError(f"--reference {reference}: its tokenizer or vocabulary size is not that of {path}")
    return tokenizer, config


def _unloadable(path: str, error: Exception) -> UserError:
    local = Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    missing = local and not Path(path).exists()
    return UserError(f"model {path}: {'no such directory' if missing else f'cannot be loaded ({first_line(error)})'}")


def load_policy(path: str, place: Place, checkpointing: bool = False) -> Policy:
    """Load a causal language model in float32, check it, and shard it; raises UserError as `load_model` does."""
    return load_model("AutoModelForCausalLM", Policy, path, place, checkpointing)


def load_reward_model(path: str, place: Place, checkpointing: bool, tokenizer, seed: int) -> RewardModel:
    """The same for a sequence classifier with one label; a language model gets a new head, drawn by `seed`.

    The classifier finds a completion's end by its pad token: that must not be the EOS, which ends it.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        specials = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        tokenizer.pad_token = next((t for t in specials if t not in (tokenizer.eos_token, tokenizer.bos_token)), None)
    if tokenizer.pad_token_id is None:
        raise UserError(f"model {path}: a reward model needs a pad token other than the EOS; give its tokenizer one")
    torch.manual_seed(seed)
    kind = ("AutoModelForSequenceClassification", RewardModel)
    model = load_model(*kind, path, place, checkpointing, new="score.weight", num_labels=1)
    model.lm.config.pad_token_id = tokenizer.pad_token_id
    return model


def load_model(
    auto: str, kind: type[Packed], path: str, place: Place, checkpointing: bool = False, new: str = "", **options
) -> Packed:
    """Load, check and shard a model; only the tensor `new` may be missing in its weights.

    Raises UserError where it cannot be loaded, a tensor is missing or not finite, or the architecture computes
    something that packed rows would not reproduce.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, span_attention)
    lm = _from_pretrained(auto, path, new, dtype=torch.float32, attn_implementation=NAME, **options)
    for name, tensor in lm.named_parameters():
        if not tensor.isfinite().all():
            raise UserError(f"model {path}: {name} holds values that are not finite")
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = kind(lm.train())  # activation checkpointing works in training mode only
    try:
        lists = [m for m in lm.base_model.modules() if isinstance(m, nn.ModuleList)]
        layers = list(next(m for m in lists if len(m) == lm.config.num_hidden_layers))
        skip_unread(layers[-1])
        if place.main and not _packing_agrees(model):
            raise ValueError("packed rows give other values than it does")
    except Exception as error:  # what an architecture lacks shows itself in many ways
        raise UserError(f"model {path}: {type(lm).__name__} is not supported ({first_line(error)})") from None
    model.sha256 = {"model": from_main(_weights_hash(lm) if place.main else None)}
    model.before = shard(model, layers, place)
    return model


@torch.no_grad()
def _packing_agrees(model: Packed) -> bool:
    """Whether packed rows give what a plain forward pass does: sliding windows or soft-capped logits would not."""
    lm = model.lm
    ids = torch.randint(lm.config.vocab_size, (16,), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([[0, 4, 7, 9], [9, 10, 11, 16]])  # two groups: prompts 4 and 1, completions 3, 2 and 1, 5
    place = Place(0, 1, torch.device("cpu"), torch.float32)
    batches = Batches(Groups(ids.int(), offsets, torch.arange(2), {}), 2, 64, None, place)
    batch = next(iter(batches))
    packed = model(batch) if isinstance(model, RewardModel) else model.logps(batch)
    pad, lm.config.pad_token_id = lm.config.pad_token_id, None  # the ids are arbitrary
    lm.eval().set_attn_implementation("sdpa")
    plain = torch.zeros_like(packed)
    for row, (start, *ends) in enumerate(offsets.tolist()):
        for k, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
            plain[row, k] = model.plain(ids[start : ends[0]], ids[a:b])
    lm.train().set_attn_implementation(NAME)
    lm.config.pad_token_id = pad
    return torch.allclose(packed, plain, rtol=1e-4, atol=1e-3)


def mean_reward(model: RewardModel, batches: Batches) -> float:
    """The mean of r over all completions of the rows."""
    with inference(model):
        steps = range(1, batches.per_epoch + 1)
        rewards = torch.cat([model(batch).flatten() for step in steps for batch in batches(step)])
    total, count = all_sum(rewards.new_tensor([rewards.sum(), len(rewards)], dtype=torch.double)).tolist()
    return total / count


def load_generator(path: str, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A causal language model as transformers has it, to generate with. Raises UserError where it cannot be loaded."""
    return _from_pretrained("AutoModelForCausalLM", path, dtype=dtype).to(device).eval()


def _from_pretrained(auto: str, path: str, new: str = "", **options) -> nn.Module:
    """A model of transformers, all of whose weights are in the file but perhaps the tensor `new`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is checked here
    options |= {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        lm, found = getattr(transformers, auto).from_pretrained(path, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for the same mistakes
        damaged = (str(file) for file in sorted(Path(path).glob("*.safetensors")) if not is_whole(file))
        raise _unloadable(next(damaged, path), error) from None
    if missing := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])} - {new}):
        raise UserError(f"model {path}: missing or misshapen in its weights: {', '.join(missing)}")
    return lm


# ---------------------------------------------------------------- the reference


def add_reference_logps(reference: str | None, model: Policy, *sets: Batches | None, per_token: bool = False) -> None:
    """Fill `groups.ref_logps` of each set, (n, K) or per token, with log π_ref of all groups that the run uses.

    π_ref is the model as it is now, unless `reference` names another. It runs once, over training's own
    micro-batches, so that at the first step the log-ratios are exactly 0, and is cached by the content of all it
    depends on: weights, token ids, order and layout.
    """
    place = next(s for s in sets if s).place
    policy = load_policy(reference, place) if reference else model
    model.sha256["reference"] = policy.sha256["model"]
    for batches in filter(None, sets):
        path = cache_directory() / f"reference-{_reference_key(policy, batches, per_token)}.safetensors"
        cached = from_main(read_tensors(path)[0]["ref_logps"] if place.main and is_whole(path) else None)
        batches.groups.ref_logps = _reference_pass(policy, batches, per_token) if cached is None else cached
        if cached is None and place.main:
            write_tensors(path, {"ref_logps": batches.groups.ref_logps})
    if reference:
        del policy
        gc.collect()  # FSDP's modules and hooks refer to each other


def _reference_pass(policy: Policy, batches: Batches, per_token: bool) -> Tensor:
    groups = batches.groups
    shape = groups.tokens.shape if per_token else (len(groups), groups.completions)
    logps = torch.zeros(shape, device=batches.place.device)
    with inference(policy):
        for step in tqdm(range(1, batches.used_steps + 1), "reference", disable=None if batches.place.main else True):
            for batch in batches(step):
                if per_token:
                    logps[batch.where] = policy(batch)
                else:
                    logps[batch.rows] = policy.logps(batch)
    return all_sum(logps).cpu()


def _reference_key(policy: Policy, batches: Batches, per_token: bool) -> str:
    """sha256 of everything that the reference's log-probs depend on."""
    groups, place, digest = batches.groups, batches.place, hashlib.sha256()
    for tensor in (groups.tokens, groups.offsets, *map(batches.rows, range(1, batches.used_steps + 1))):
        digest.update(tensor.contiguous().numpy())
    layout = [per_token, batches.batch_size, batches.budget, place.world, place.device.type, str(place.dtype)]
    key = [policy.sha256["model"], digest.hexdigest(), layout, torch.__version__]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _weights_hash(lm: nn.Module) -> str:
    """sha256 of a model's weights and configuration."""
    digest = hashlib.sha256()
    for name, tensor in lm.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    config = {k: v for k, v in lm.config.to_dict().items() if not k.startswith("_")}  # not where it lies
    digest.update(json.dumps(config, default=str).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- the result


def export(model: Policy, tokenizer, run) -> None:
    """Write the trained model, gathered, in float32, as a Hugging Face directory into the output directory.

    config.json, without which nothing loads it, comes last.
    """
    place, state, full = run.place, {}, {}
    for name, tensor in model.lm.state_dict(keep_vars=True).items():
        if id(tensor) not in full:  # tied weights are one tensor under two names
            gathered = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
            full[id(tensor)] = gathered.cpu() if place.main else None
        state[name] = full[id(tensor)]
    if not place.main:
        return
    temporary = run.out / ".export"
    try:
        with writing(run.out):
            model.lm.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(run.card())
            for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
                os.replace(file, run.out / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
