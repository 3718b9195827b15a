"""The private step's work on a micro-batch as one CUDA graph: losses, one backward, norms, clipping, sum.

A CPU takes longer to launch a step's kernels than a GPU to run them; a graph is one launch. A replay repeats what the GPU did
during the capture, and runs no Python. So everything that must be checked, or that may change, stays outside the graph:

- the batch, the mask and the clipping bounds are copied into the memory that the graph reads, before each replay;
- the sums start at zero inside the graph, and are added to the clipper's outside, where the noise is added too;
- the model is checked before each replay, and the graph is captured again if one of its tensors is another one, or if its
  training or autocast mode changed;
- a batch that is due for the probe (`per_sample/refusals.py`: backward passes that show samples to be independent) is computed
  without the graph. So are all batches until the probe has seen this kind of computation, and only that kind is captured. The
  graph holds the memory of a whole step. Before a probed batch this memory is released, so that a step never needs it twice;
  afterwards the graph is captured again. Just before it is released, the graph computes the batch's losses once more: if those
  computed without it differ, the graph does not repeat what Python does any more, and the step is refused.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastloda.errors import UserError
from fastloda.per_sample.backward import per_sample_grads
from fastloda.per_sample.compute import check_losses, check_mask, checked_graph, in_full_precision
from fastloda.per_sample.members import Members
from fastloda.per_sample.refusals import Looks, looks_of
from fastloda.privacy.ranks import hand_back_shards
from fastloda.privacy.stats import StepStats
from fastloda.privacy.step import Clipped, GhostClipper
from fastloda.privacy.sums import FlatSums
from fastloda.randomness import generator_states, restore_generators, restored


class CaptureError(UserError):
    """The error of a step that no graph can repeat, though `GhostClipper` could make it."""


class Outcome(NamedTuple):
    """The tensors in which a graph leaves its results at every replay."""

    sums: FlatSums
    clipped: Clipped
    losses: Tensor
    looks: Looks


Run = Callable[[], Outcome]


class CapturedStep:
    """A `GhostClipper.accumulate` that computes the losses as well, all as one launch.

    >>> clipper = GhostClipper(model, max_grad_norm=1.0)
    >>> step = CapturedStep(clipper, lambda x, y: loss(model(x), y))      # one number per sample
    >>> for x, y, mask in micro_batches:                                  # all of one shape; False in mask marks padding
    ...     step.accumulate(x, y, mask=mask)
    >>> clipper.privatize(noise_multiplier=1.0, expected_batch_size=256)
    >>> optimizer.step()

    The guarantees are the clipper's. The first micro-batch is computed without a graph, and so are later ones that are probed
    (the 4th, 16th, 64th, ...). After each of them `losses` is called three times, to capture the graph; a replay does not call
    it. So it may depend on nothing but its inputs, the model's tensors and modes, and random numbers drawn on the GPU. Anything
    else that it reads keeps the value of the time of the capture; the next probed batch reveals that such a value has changed.

    Args:
        clipper: the clipper in which micro-batches are accumulated. Its own `accumulate` may be called for others in between.
        losses: a function of tensors (or tuples, lists, dicts of them) -> [samples * views] losses, as `accumulate` takes them.
        generators: the generators on the GPU that `losses` draws from, except PyTorch's own.

    Raises:
        CaptureError: the model is not on a CUDA GPU.
    """

    def __init__(
        self, clipper: GhostClipper, losses: Callable[..., Tensor], generators: Sequence[torch.Generator] = ()
    ):
        self._clipper, self._losses = clipper, losses
        self._generators = {f"generator {i}": generator for i, generator in enumerate(generators)}
        self._device = next(iter(clipper.parameters.values())).device
        if not can_capture(self._device):
            raise CaptureError(f"the model is on {self._device.type!r}: only a CUDA GPU captures graphs; move it there")
        self._shapes: str | None = None  # the shapes of the inputs, from the first call on
        self._samples = 1  # the number of samples in each micro-batch
        self._looks = Looks()  # what the probe has seen of these losses
        self._places: object = None  # where the model was when it was captured
        self._outside: list[Tensor] = []  # other tensors that the graph reads, kept alive for it
        self._graph: tuple[_Memory, Run] | None = None
        self._expected: Tensor | None = None  # the next micro-batch's losses by a graph that was released

    def accumulate(
        self, *inputs: Any, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[StepStats, Tensor]:
        """Add the clipped gradients of a micro-batch, and return its counts and its losses.

        Args:
            inputs: what `losses` takes: tensors on the GPU, of the same shapes and dtypes at every call.
            mask: as in `GhostClipper.accumulate`.
            weights: [samples * views], public factors of the losses; the returned losses are not multiplied by them.

        Raises:
            CaptureError: no graph can repeat this step; the message says why, and nothing has changed.
            ValueError, PrivacyError: as `GhostClipper.accumulate`.
        """
        if hand_back_shards(self._clipper.model):
            raise CaptureError(
                "the model's weights are sharded, so that ranks meet within a step: no graph repeats that"
            )
        given = _Given.of(inputs, weights, self._device)
        self._check_shapes(given)
        places = self._places_of(self._clipper.check_model())
        if places != self._places:
            self._places, self._looks = places, Looks()
            self.release()  # without a replay: the memory that the graph reads may hold other tensors by now
        if not self._looks.knows(self._samples) or self._looks.due() or self._expected is not None:
            return self._launch(given, mask)
        return self._replayed(given, check_mask(mask, self._samples, self._device))

    def release(self, *inputs: Any) -> None:
        """Free the memory that the graph holds; it is captured again for the next micro-batch that may be replayed.

        inputs: those of the next micro-batch, if its losses, computed without a graph, must be compared with the graph's.
        """
        self._expected = self._replayed_losses(_Given.of(inputs, None, self._device)) if inputs else None
        self._graph, self._outside = None, []

    def _launch(self, given: "_Given", mask: Tensor | None) -> tuple[StepStats, Tensor]:
        """Accumulate without a graph; if there is one, compare its losses with those computed here, and release it."""
        clipper, before = self._clipper, generator_states(self._generators)
        if self._graph is not None:
            self.release(*given.inputs)
        expected, self._expected = self._expected, None
        try:
            losses, weighed = self._losses_of(given)
            if expected is not None and not _are_alike(expected, losses.detach()):
                raise CaptureError(
                    "losses() gives other values than a graph: it follows something in Python that changed"
                )
            self._samples, _ = check_losses(weighed, clipper.views, mask)
            graph = checked_graph(weighed, clipper.model, clipper.parameters, self._samples)
            if graph.unsure:
                raise CaptureError("the data picks or reorders rows, so that every batch must be probed")
        except CaptureError:
            restore_generators(self._generators, before)
            raise
        self._looks = looks_of(clipper.model, graph)
        self._shapes = given.shapes
        return clipper.accumulate(weighed, mask), losses.detach()

    def _losses_of(self, given: "_Given") -> tuple[Tensor, Tensor]:
        """Compute the losses, and the losses times their weights."""
        losses = self._losses(*given.inputs)
        return losses, losses if given.weights is None else losses * given.weights.to(losses.dtype)

    def _replayed(self, given: "_Given", mask: Tensor) -> tuple[StepStats, Tensor]:
        """Accumulate by replaying the graph, which is captured first if there is none."""
        clipper = self._clipper
        memory, replay = self._graph or (_Memory(given.like(), mask.clone(), clipper.bounds.clone()), None)
        memory.fill(given, mask, clipper.bounds)
        if replay is None:
            replay = self._captured(memory)
            clipper.check_model()  # refuses a graph that writes to the model: the capture counts such writes, a replay does not
            self._graph = memory, replay
        self._looks.count()
        found = replay()
        clipped = Clipped(found.clipped.norms, StepStats(found.clipped.stats.totals.clone()))
        return clipper.add(found.sums, clipped, memory.mask), found.losses.clone()

    def _replayed_losses(self, given: "_Given") -> Tensor | None:
        """Compute the losses by replaying the graph, if there is one for this model and these shapes, or return None.

        Neither the clipper's sums nor the random states change.
        """
        if self._graph is None or self._places_of(self._clipper.check_model()) != self._places:
            return None
        memory, replay = self._graph
        if memory.given._replace(weights=None).shapes != given._replace(weights=None).shapes:
            return None
        memory.given.copy_(given)
        with restored(self._generators):
            return replay().losses.clone()

    def _captured(self, memory: "_Memory") -> Run:
        """Find the tensors that the losses read, then capture a graph of `_run`; no random state changes.

        Raises:
            CaptureError: the step can't be captured; the message says why.
        """
        host = _host_random(self._device)
        with restored(self._generators), _without_cached_casts():
            try:
                with _Outside() as outside:
                    self._losses_of(memory.given)
                self._outside = outside.tensors
                replay, captured = RECORDERS[self._device.type](
                    partial(self._run, memory), list(self._generators.values()), self._device
                )
            except UserError:
                raise
            except Exception as error:
                raise CaptureError(
                    f"the step can't be captured as a graph ({error}): losses and model may not wait for the GPU (.item(), "
                    ".cpu(), an if over a tensor), and draw only from generators on it that CapturedStep was given"
                ) from error
            if _host_random(self._device) != host:
                raise CaptureError(
                    "losses or model draw random numbers on the CPU, which a graph would repeat: draw them on the GPU"
                )
        if captured.looks is not self._looks:
            raise CaptureError("losses() computes something else from call to call, of which a graph would repeat one")
        return replay

    def _run(self, memory: "_Memory") -> Outcome:
        """Do the work that the graph repeats: read the numbers in `memory`, and return the tensors that hold the results."""
        clipper = self._clipper
        losses, weighed = self._losses_of(memory.given)
        samples, mask = check_losses(weighed, clipper.views, memory.mask)
        with in_full_precision(self._device):
            graph = checked_graph(weighed, clipper.model, clipper.parameters, samples)
            grads = per_sample_grads(weighed, graph, clipper.parameters, samples)
            sums = FlatSums(clipper.parameters)
            clipped = clipper.clip_into(sums, weighed, grads, mask, memory.bounds)
        return Outcome(sums, clipped, losses.detach(), looks_of(clipper.model, graph))

    def _check_shapes(self, given: "_Given") -> None:
        """Refuse inputs whose shapes or dtypes differ from those of the first call."""
        if self._shapes not in (None, given.shapes):
            raise CaptureError(
                f"the inputs were {self._shapes} before and are {given.shapes} now, but a graph repeats one shape: pad the "
                "batch, and let the mask tell padding; or use GhostClipper.accumulate"
            )

    def _places_of(self, members: Members) -> object:
        """Describe what a graph depends on and may well change: the tensors' addresses, shapes and dtypes, and the modes."""
        tensors = (*members.parameters.values(), *members.buffers.values())
        kind = self._device.type
        return (
            [(_address(t), t.shape, t.dtype) for t in tensors],
            [module.training for module in members.modules.values()],
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )


class _Given(NamedTuple):
    """The inputs of a micro-batch, and the weights of its losses."""

    inputs: tuple
    weights: Tensor | None

    @classmethod
    def of(cls, inputs: tuple, weights: Tensor | None, device: torch.device) -> "_Given":
        """Check that the inputs are tensors on the device, and move the weights there."""
        given = cls(inputs, None if weights is None else weights.to(device))
        for leaf in given.tensors:
            if not isinstance(leaf, Tensor) or leaf.device != device:
                got = f"a tensor on {leaf.device}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
                raise CaptureError(f"the inputs must be tensors on {device}, got {got}: a graph reads nothing else")
        return given

    @property
    def tensors(self) -> list:
        """The tensors of the inputs, in a fixed order, then the weights."""
        return tree_leaves((self.inputs, *([] if self.weights is None else [self.weights])))

    def like(self) -> "_Given":
        """Make uninitialised tensors of the same structure, shapes and dtypes."""
        leaves, structure = tree_flatten(tuple(self))
        own = [leaf if leaf is None else torch.empty_like(leaf).requires_grad_(leaf.requires_grad) for leaf in leaves]
        return _Given(*tree_unflatten(own, structure))

    @property
    def shapes(self) -> str:
        """The structure, shapes and dtypes as a string."""
        leaves, structure = tree_flatten(tuple(self))
        shapes = [leaf if leaf is None else f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in leaves]
        return str(tree_unflatten(shapes, structure))

    def copy_(self, other: "_Given") -> None:
        """Copy the numbers of `other` into these tensors."""
        with torch.no_grad():
            for own, new in zip(self.tensors, other.tensors):
                own.copy_(new, non_blocking=True)


class _Memory(NamedTuple):
    """The memory that a graph reads."""

    given: _Given
    mask: Tensor
    bounds: Tensor

    def fill(self, given: _Given, mask: Tensor, bounds: Tensor) -> None:
        """Copy the numbers of a micro-batch into this memory."""
        self.given.copy_(given)
        self.mask.copy_(mask)
        self.bounds.copy_(bounds)


def _are_alike(a: Tensor, b: Tensor) -> bool:
    """Tell whether the losses `a` and `b` differ by no more than rounding."""
    rounding = max(1e-3, 4 * torch.finfo(b.dtype).eps)
    typical = float(b.nan_to_num(0.0, 0.0, 0.0).abs().mean())
    return torch.allclose(a, b, rounding, rounding * typical, equal_nan=True)


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # raised by tensor subclasses that wrap other tensors
        return id(t)


class _Outside(TorchDispatchMode):
    """The dispatch mode that collects the tensors that operations read and that were not made inside it.

    A graph reads them at every replay: if they were freed, their memory could hold other tensors by then.
    """

    def __init__(self):
        super().__init__()
        self._made: set[int] = set()
        self._found: dict[int, Tensor] = {}

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._found.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in _strided((args, kwargs)):
            storage = t.untyped_storage()._cdata
            if storage not in self._made:
                self._found[storage] = t
        out = func(*args, **(kwargs or {}))
        self._made.update(
            t.untyped_storage()._cdata for t in _strided(out) if t.untyped_storage()._cdata not in self._found
        )
        return out


def _strided(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.layout == torch.strided]


def _host_random(device: torch.device) -> str:
    """Read the states of the CPU's random generators, without torch's if the model is on the CPU itself."""
    states = generator_states({})
    return repr([states["numpy"], states["python"], None if device.type == "cpu" else states["torch"].tolist()])


@contextmanager
def _without_cached_casts() -> Generator[None]:
    """Turn off autocast's cache of cast weights: a graph would read a cached cast of the old weights at every replay."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


# ---- The one place that knows of CUDA graphs.


def can_capture(device: torch.device) -> bool:
    """Tell whether steps of a model on this device can be captured."""
    return device.type in RECORDERS


def record_cuda(run: Run, generators: Sequence[torch.Generator], device: torch.device) -> tuple[Run, Outcome]:
    """Capture a graph of `run`; return a function that replays it and returns its outcome, and that outcome.

    `run` is called once before the capture, so that all kernels are compiled. An operation that waits for the GPU raises in
    that call: an error during the capture might leave PyTorch's random generators unusable.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    for generator in generators:
        if generator.device.type == "cuda":
            graph.register_generator_state(generator)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), _waiting_refused():
        run()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outcome = run()

    def replay() -> Outcome:
        with torch.cuda.device(device):
            graph.replay()
        return outcome

    return replay, outcome


@contextmanager
def _waiting_refused() -> Generator[None]:
    """Let PyTorch raise an error inside the context where it would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


RECORDERS = {"cuda": record_cuda}  # device type -> recorder
