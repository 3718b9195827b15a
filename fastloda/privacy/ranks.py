"""Private steps of several processes: each takes its share of a batch, and all end the step with the same private gradient.

    share of the records --accumulate--> clipped sums --reduce--> rank 0: + noise, once --broadcast--> .grad

Run a script with `torchrun`, call `torch.distributed.init_process_group()` in it, and `DPTrainer`, `make_private` or a
`GhostClipper` finds the other processes by itself. The first two divide each batch among the ranks. In a loop of your own, draw
one Poisson sample on all ranks and take each rank's `fastloda.training.sampling.share`: a record on two ranks would be clipped
on each, and contribute double the bound.

One flat buffer is sent to rank 0 and one comes back. An all-reduce of the sums would move as many bytes, but the noise would
have to be sent as well; and only rank 0 ever holds the sum before noise is added. The bits of rank 0's gradient come back, so
that replicas can't drift apart by rounding. The sum itself is in float64; the gradients that go into it are not, so that
another division of the samples into micro-batches or ranks rounds them in another way.

The ranks that take part are fixed when the clipper or the trainer is made. If a process group is initialised, destroyed or
replaced after that, the next step is refused: it would sum over other ranks than those that the noise and the accounting are
for.

Frozen weights may be sharded with FSDP2, while the adapters stay whole on every rank:

>>> adapters = {p for p in model.parameters() if p.requires_grad}
>>> for block in model.blocks:
...     fully_shard(block, ignored_params=adapters)
>>> fully_shard(model, ignored_params=adapters)

Every forward and backward pass is then made by all ranks together, so all call `accumulate` equally often, each time with at
least one sample, masked if need be. `DPTrainer` sees to that. The step reshards the root module's own weights, which FSDP2
leaves gathered between forward and backward; the backward pass gathers them again.

If one rank raises, the others wait for it in the next collective, until `torchrun` ends them because that rank has died, or the
process group times out (its `timeout` argument). Within a step of `DPTrainer` the others raise as well, naming the rank, unless
weights are sharded: they are then in the middle of a forward or backward pass, which they can't leave.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from fastloda.errors import PrivacyError, UserError
from fastloda.privacy.watch import bits

# The ranks of a step: those of this process group; None: of the default group, if it is initialised; "alone": this process.
Group = ProcessGroup | Literal["alone"] | None
T = TypeVar("T")
Key = TypeVar("Key")


@dataclass(frozen=True)
class World:
    """The processes of one private run.

    `sum_to_first` and all public methods after it are collectives: if a rank does not call one, the others wait for ever.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    process: int | None = None  # the id of the process that joined the group; a forked child has another

    @classmethod
    def of(cls, group: Group = None) -> Self:
        """Find the world of a group (see `Group`).

        Raises:
            ValueError: this process is not in the group.
            PrivacyError: torchrun started this process, but no process group is initialised: each process would train for
                itself on the private records, and all of them together would spend a multiple of the budget.
        """
        if isinstance(group, str):
            if group != "alone":
                raise UserError(f'group must be a process group, None or "alone", got {group!r}')
            return cls()
        if not dist.is_initialized():
            if dist.is_torchelastic_launched():
                raise PrivacyError(
                    "torchrun started this process, but no process group is initialised: call "
                    'torch.distributed.init_process_group() first, or pass group="alone" for a run of its own'
                )
            return cls()
        group = dist.group.WORLD if group is None else group
        if dist.get_rank(group) < 0:
            raise UserError(f"rank {dist.get_rank()} is not in the group it was given")
        return cls(dist.get_rank(group), dist.get_world_size(group), group, os.getpid())

    def unchanged(self, group: Group = None) -> Self:
        """Return this world if `of(group)` still finds the same one; this is no collective.

        Raises:
            PrivacyError: `of` finds another world, or the group is gone.
        """
        try:
            now = World.of(group)
        except (ValueError, RuntimeError) as error:
            raise PrivacyError(f"{self._parted()}, and now: {error}") from error
        if now != self and not now.size == self.size == 1:
            raise PrivacyError(
                f"{self._parted()}, and now is {now._described()}: its noise and its account do not fit such a sum. Initialise "
                "the process group first, then call GhostClipper, make_private or DPTrainer (it goes on from its checkpoint), or "
                'give the first or the last group="alone"'
            )
        return self

    def _parted(self) -> str:
        return f"the private step was made for {self._described()}"

    def _described(self) -> str:
        if self.group is None:
            return "one process"
        return f"rank {self.rank} of {self.size} in process group {self.group.group_name!r} (process {self.process})"

    @property
    def first(self) -> bool:
        """Whether this is rank 0: it draws the noise, writes the checkpoint and shows the progress."""
        return self.rank == 0

    def sum_to_first(self, tensors: Mapping[Key, Tensor]) -> Mapping[Key, Tensor]:
        """Sum tensors over the ranks, in one flat buffer: rank 0 returns the sums, the others return `tensors`."""
        if self.size == 1:
            return tensors
        flat = self._flat(list(tensors.values()))
        dist.reduce(flat, group=self.group, group_dst=0)
        if not self.first:
            return tensors
        sums = {name: torch.empty_like(t) for name, t in tensors.items()}
        _scatter(flat, list(sums.values()))
        return sums

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's tensors into every rank's, in place and bit for bit, in one flat buffer."""
        if self.size == 1:
            return
        flat = self._flat(tensors)
        dist.broadcast(flat.view(torch.uint8), group=self.group, group_src=0)
        if not self.first:
            _scatter(flat, tensors)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, on each of them."""
        return self._all_reduced(tensor, dist.ReduceOp.SUM)

    def most(self, number: int) -> int:
        """Find the largest of the ranks' integers, on each of them."""
        return int(self._all_reduced(torch.tensor(number), dist.ReduceOp.MAX))

    def gather(self, value: T) -> list[T]:
        """List every rank's value, by rank. Values are pickled: keep them small."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, compute: Callable[[], T]) -> T:
        """Call compute() on rank 0 alone; every rank returns its result, or raises its exception."""
        if self.size == 1:
            return compute()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = compute()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Raise an error on all ranks if they differ in `facts`, which map names to values; values are compared by repr.

        Raises:
            ValueError: ranks differ; the message names at most five facts, with every rank's values.
            RuntimeError: another rank called `tell_failure` instead.
        """
        if self.size > 1:
            self._meet(dict(facts))

    def tell_failure(self, error: Exception) -> None:
        """Report `error` to the ranks that call `check_same`, which then raise; this rank calls it in place of `check_same`."""
        if self.size > 1:
            self._meet(f"{type(error).__name__}: {error}")

    def _meet(self, statement: dict[str, object] | str) -> None:
        """Compare the ranks' statements, each its facts or a string about its failure; 8 bytes per rank unless they differ."""
        digest = hashlib.sha256(repr(statement).encode()).digest()
        mine = self._carried(torch.tensor([int.from_bytes(digest[:8], "little", signed=True)]))
        digests = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(digests, mine, group=self.group)
        if len(set(torch.cat(digests).tolist())) == 1:
            return
        statements = self.gather(statement)
        failures = {rank: s for rank, s in enumerate(statements) if isinstance(s, str)}
        if self.rank in failures:
            return  # this rank raises its own error
        if failures:
            raise RuntimeError("; ".join(f"rank {rank} failed: {failure}" for rank, failure in failures.items()))
        raise UserError(_differences([facts for facts in statements if not isinstance(facts, str)]))

    def _all_reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return tensor
        total = self._carried(tensor.clone())
        dist.all_reduce(total, operation, group=self.group)
        return total.to(tensor.device)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors in one flat buffer, in a dtype that holds each of them exactly."""
        dtype = tensors[0].dtype
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        device = tensors[0].device
        return self._carried(torch.cat([t.detach().reshape(-1).to(device, dtype) for t in tensors]))

    def _carried(self, tensor: Tensor) -> Tensor:
        """Move a tensor to a device that the group's backend supports in every collective; for gloo that is the CPU only."""
        backends = dict(part.split(":") for part in dist.get_backend_config(self.group).split(","))
        if backends.get(tensor.device.type, "gloo") != "gloo":
            return tensor
        return tensor.to("cpu" if "cpu" in backends else next(iter(backends)))


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view(tensor.shape))


def _differences(statements: Sequence[Mapping[str, object]]) -> str:
    names = dict.fromkeys(name for facts in statements for name in facts)
    values = {name: [repr(facts[name]) if name in facts else "absent" for facts in statements] for name in names}
    told = [
        f"{name} is " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(by_rank))
        for name, by_rank in values.items()
        if len(set(by_rank)) > 1
    ]
    return f"the ranks disagree: {'; '.join(told[:5])}"


# ---- the model on several ranks


def replicate(model: nn.Module, group: Group = None) -> None:
    """Copy rank 0's trainable parameters to all ranks: a private step refuses to start from different ones.

    Call it on all ranks after `attach_loda`, which draws the adapters at random; `DPTrainer` does so. Frozen weights are not
    copied: load the same ones on every rank.

    Raises:
        ValueError: the ranks' trainable parameters differ in name, shape or dtype.
    """
    world = World.of(group)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    world.check_same(parameter_facts(parameters))
    world.copy_from_first(list(parameters.values()))


def parameter_facts(parameters: Mapping[str, nn.Parameter]) -> dict[str, object]:
    """List the facts that must be the same on all ranks for their gradients to be added: dtypes and shapes."""
    return {f"parameter {name!r}": f"{p.dtype} {list(p.shape)}" for name, p in parameters.items()}


def value_facts(parameters: Mapping[str, nn.Parameter]) -> dict[str, object]:
    """Compute, by one pass, the checksum of the parameters' bits, as a fact for `check_same`: replicas must be equal."""
    total = int(bits(parameters.values()))
    return {"the checksum of the trainable parameters (fastloda.privacy.ranks.replicate makes them equal)": total}


def hand_back_shards(model: nn.Module) -> bool:
    """Reshard the frozen weights that FSDP2 left gathered; return whether it shards any module of the model.

    While they are gathered the model holds other parameter objects, as if frozen weights had been replaced.
    """
    if not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule  # not at the top: takes half a second that one process can save

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
    return bool(sharded)


def check_wrappers(model: nn.Module, world: World) -> None:
    """Refuse wrappers and shards that would let gradients bypass the private step, or hide parameters from it.

    Raises:
        PrivacyError: names the module or the parameter, and says what to do.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for name, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, FullyShardedDataParallel)):
            raise PrivacyError(
                f"{name or 'the model'!r} is wrapped in {type(module).__name__}, which sums gradients that are not clipped: pass "
                "the module that it wraps; the private step adds up the ranks' clipped sums by itself (fully_shard may shard "
                "the frozen weights)"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter.requires_grad:
            raise PrivacyError(
                f"trainable parameter {name!r} is sharded: keep it whole on every rank, by "
                "fully_shard(..., ignored_params={p for p in model.parameters() if p.requires_grad})"
            )
        if isinstance(parameter, DTensor) and parameter.device_mesh.size() > world.size:
            raise PrivacyError(
                f"{name!r} is sharded over {parameter.device_mesh.size()} ranks, but the step is of {world.size}: those that "
                "share the weights must make it together; choose another group"
            )


def check_not_sharded(sharded: bool) -> None:
    if sharded:
        raise UserError(
            "losses is empty, but the model's weights are sharded, so that every rank must make every backward pass: give a rank "
            "that has no sample a masked one"
        )
