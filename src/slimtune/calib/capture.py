"""Running a model block by block over calibration tokens, with one block of weights and one cached activation.

The model's own forward is what runs, so masks, rotary embeddings, position biases and per-layer attention types are the
model's own. Blocks that were already passed are replaced, for the time of the pass, by a `_Replay` that hands out
the cached output; blocks still to come are never reached. A block is run in stages: once per group of layers that
share an input, stopping just before it, so that every layer is calibrated on what the already quantized layers before
it really produce (GPTQ's "true sequential" order) at the cost of about two forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.arch import Block, ModelMap, Norm, Space
from slimtune.calib.stats import STATISTICS
from slimtune.errors import CalibrationError
from slimtune.kernels.memory import release
from slimtune.kernels.precision import bfloat16_units, fast_matmul


class _Stop(BaseException):
    """Leaves a forward pass that has shown what it was run for (not an error, so not an Exception)."""


class _Replay(nn.Module):
    """Stands for a block that was passed: returns its cached output, or the input where a later block's is cached."""

    def __init__(self, stream: CalibrationStream, block: Block, rest: dict[int, tuple[Any, ...] | None]) -> None:
        super().__init__()
        self._stream, self._block, self._rest = stream, block, rest

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        if self._stream.latest.get(self._block.stack) is self._block:
            hidden = self._stream.states(self._block.stack).get(self._stream.batch)
        rest = self._rest[hidden.shape[0]]
        return hidden if rest is None else (hidden, *rest)


class _Once(nn.Module):
    """A part of a block whose weights are final: runs once per micro-batch, and is remembered from then on.

    Where the part hands out what its `last` linear made, and the inputs of that linear were kept, it alone runs.
    """

    def __init__(self, stream: CalibrationStream, part: nn.Module, last: nn.Module, inputs: _Shelf | None) -> None:
        super().__init__()
        self._stream, self._part, self._last, self._inputs = stream, part, last, inputs
        self._shelf = _Shelf(stream.samples, stream.batch_size)
        self._rest: dict[int, tuple[Any, ...] | None] = {}
        self._seen = 0

    def forward(self, *args: object, **kwargs: object) -> object:
        batch = self._stream.batch
        if batch == self._seen:
            hidden = self._run(*args, **kwargs)  # may choose the shelf
            self._shelf.put(batch, hidden)
            self._seen += 1
        hidden = self._shelf.get(batch)
        rest = self._rest[hidden.shape[0]]
        return hidden if rest is None else (hidden, *rest)

    @property
    def deaf(self) -> bool:
        """Whether what comes in is not read, for the micro-batch that runs now."""
        batch = self._stream.batch
        return batch < self._seen or (self._inputs is not None and self._inputs.rows(batch) in self._rest)

    def _run(self, *args: object, **kwargs: object) -> Tensor:
        if self._inputs is not None and self.deaf:
            return cast(Tensor, self._last(self._inputs.get(self._stream.batch)))
        made: list[Tensor] = []
        handle = self._last.register_forward_hook(lambda _, __, output: made.append(output))
        try:
            hidden, self._rest[len(self._stream.tokens)] = _taken_apart(self._part(*args, **kwargs))
        finally:
            handle.remove()
        if not (made and hidden is made[-1]):
            self._inputs = None
        elif self._inputs is not None and self._inputs.fits(hidden):
            self._shelf = self._inputs  # each output over the input it was made of
        return hidden


class _Unread(nn.Module):
    """A normalisation before a settled part, left out when that part does not read it."""

    def __init__(self, part: _Once, norm: nn.Module) -> None:
        super().__init__()
        self._part, self._norm = part, norm

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if self._part.deaf else cast(Tensor, self._norm(hidden))


class _Shelf:
    """Hidden states of all windows in one allocation, put and taken a micro-batch at a time.

    One allocation, since many that outlive the passes between which they are made would leave the heap full of holes.
    """

    def __init__(self, samples: int, batch_size: int) -> None:
        self._samples, self._batch_size = samples, batch_size
        self._states: Tensor | None = None

    def put(self, batch: int, hidden: Tensor) -> None:
        if self._states is None:
            self._states = hidden.new_empty((self._samples, *hidden.shape[1:]))
        self.get(batch).copy_(hidden)

    def get(self, batch: int) -> Tensor:
        assert self._states is not None, "a pass has filled it"
        return self._states[batch * self._batch_size : (batch + 1) * self._batch_size]

    @property
    def full(self) -> bool:
        """Whether anything was put here (a pass puts every micro-batch or none)."""
        return self._states is not None

    def rows(self, batch: int) -> int:
        """Windows in this micro-batch."""
        return min(self._batch_size, self._samples - batch * self._batch_size)

    def fits(self, hidden: Tensor) -> bool:
        """Whether hidden states like these lie here."""
        assert self._states is not None, "a pass has filled it"
        return self._states.dtype == hidden.dtype and self._states.shape[1:] == hidden.shape[1:]


def _taken_apart(output: Tensor | tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The hidden states a module returns, and what else it returns (T5: position biases). The latter depends on the
    shape of the batch alone, since calibration windows have no padding: it is kept once per batch size."""
    return (output, None) if isinstance(output, Tensor) else (cast(Tensor, output[0]), tuple(output[1:]))


class CalibrationStream:
    """The calibration tokens on their way through the blocks of a model.

    Use `calibration_stream`, then for every block in order: `enter` it, `collect` each of its stages, `settle` that
    when its weights are final, and `advance` past the block. Memory: one output `[samples, length, hidden]` per stack
    and one of each settled part, in bfloat16 where the passes run in it, and what one micro-batch needs in one block.

    A float32 block computes in bfloat16 between `enter` and `advance` where the hardware has units for it.
    """

    def __init__(self, model: nn.Module, norms: Sequence[Norm], tokens: Tensor, batch_size: int) -> None:
        self._model, self._norms = model, norms
        self._batches = tokens.split(batch_size)
        self.samples, self.batch_size = len(tokens), batch_size
        self._replaced: list[tuple[nn.ModuleList, int, nn.Module]] = []
        self._settled: list[tuple[nn.Module, str, nn.Module]] = []
        self._inputs: dict[str, _Shelf] = {}
        self._leave: Callable[[], None] = lambda: None
        self._reference: dict[str, _Shelf] = {}
        self._dense_inputs: dict[int, _Shelf] = {}
        self._following = False
        self.batch = 0
        self.cache: dict[str, _Shelf] = {}
        self.latest: dict[str, Block] = {}

    @property
    def tokens(self) -> Tensor:
        """The micro-batch that runs now."""
        return self._batches[self.batch]

    def states(self, stack: str) -> _Shelf:
        """What the blocks of `stack` that were passed make: the dense ones, while those are followed."""
        return (self._reference if self._following else self.cache)[stack]

    def enter(self, block: Block, *, follow: bool = False) -> None:
        """Begin with `block`, whose weights are in place and dense; with `follow` for all blocks or for none."""
        self._lower(block)
        if follow:
            self._follow(block)

    def _lower(self, block: Block) -> None:
        module = self._model.get_submodule(block.name)
        weights = [(parameter, parameter.data) for parameter in module.parameters()]
        if not all(data.dtype == torch.float32 and bfloat16_units(data.device) for _, data in weights):
            return
        for parameter, data in weights:
            parameter.data = data.to(torch.bfloat16)
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: _lowered((args, kwargs)), with_kwargs=True, prepend=True
        )

        def leave() -> None:
            handle.remove()
            for parameter, data in weights:
                parameter.data = data

        self._leave = leave

    def collect(
        self, block: Block, stage: int, needs: Iterable[str], rounding: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The statistics named in `needs` of the input that the linears of this stage of `block` share, over all
        tokens; of what `rounding` makes of it, where the linears will see that instead."""
        module = self._model.get_submodule(block.stages[stage][0].name)
        device = next(module.parameters()).device
        width = cast(int, module.in_features)
        statistics = {name: STATISTICS[name](width, device) for name in needs}

        dense = self._dense_inputs.get(stage)

        def update(x: Tensor) -> None:
            seen = x if rounding is None else rounding(x)
            true = x if dense is None else dense.get(self.batch).view_as(x)
            for statistic in statistics.values():
                statistic.update(seen, true)

        self.watch(block, stage, update)
        return {name: statistic.result() for name, statistic in statistics.items()}

    def _follow(self, block: Block) -> None:
        """Run `block` with the dense weights it still has, on what the dense blocks before it made; keep what each of
        its stages reads, and what it makes for the next block. Costs a pass, and the inputs of all stages in memory."""
        self._dense_inputs = {n: _Shelf(self.samples, self.batch_size) for n in range(len(block.stages))}
        out = self._reference.get(block.stack) or _Shelf(self.samples, self.batch_size)

        def keep(shelf: _Shelf) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:  # OPT reads all tokens as one row
                shelf.put(self.batch, args[0].reshape(len(self.tokens), -1, args[0].shape[-1]))

            return take

        def leave(_: nn.Module, __: tuple[object, ...], output: Tensor | tuple[Any, ...]) -> None:
            out.put(self.batch, _taken_apart(output)[0])
            raise _Stop

        handles = [
            self._model.get_submodule(ports[0].name).register_forward_pre_hook(keep(self._dense_inputs[number]))
            for number, ports in enumerate(block.stages)
        ]
        handles.append(self._model.get_submodule(block.name).register_forward_hook(leave))
        self._following = True
        try:
            self._run_all()
        finally:
            self._following = False
            for handle in handles:
                handle.remove()
        self._reference[block.stack] = out

    def watch(self, block: Block, stage: int, see: Callable[[Tensor], None]) -> None:
        """Show `see` the input that the linears of this stage of `block` share, a micro-batch at a time."""
        ports = block.stages[stage]
        module = self._model.get_submodule(ports[0].name)
        # What a lone linear reads is kept: its outputs may be all that is wanted when it is final (see `_Once`).
        shelf = _Shelf(self.samples, self.batch_size) if len(ports) == 1 and stage + 1 < len(block.stages) else None

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(args[0])
            if shelf is not None and args[0].shape[:-1] == self.tokens.shape:  # OPT reads all tokens as one row
                shelf.put(self.batch, args[0])
            raise _Stop

        handle = module.register_forward_pre_hook(take)
        try:
            self._run_all()
        finally:
            handle.remove()
        if shelf is not None and shelf.full:
            self._inputs[ports[0].name] = shelf

    def settle(self, block: Block, stage: int) -> None:
        """The weights of `block` up to and with its stage of this number are final: parts that are all of such weights
        (attention, say) need not run again for the stages to come."""
        stages = [{port.name for port in ports} for ports in block.stages]
        done = set[str]().union(*stages[: stage + 1])
        if done == set[str]().union(*stages):
            return  # one pass is left, and it runs every part once
        module = self._model.get_submodule(block.name)
        last = block.stages[stage][-1].name
        inputs = self._inputs.pop(last, None)
        for owner, leaf, path in list(_parts(module, block.name)):
            inside = {name for names in stages for name in names if name.startswith(f"{path}.")}
            part = owner.get_submodule(leaf)
            if inside and inside <= done and not isinstance(part, _Once):
                mine = inputs if last in inside else None
                once = _Once(self, part, self._model.get_submodule(last), mine)
                self._replace(owner, leaf, once)
                for norm in self._norms:
                    if norm.feeds and inside.issuperset(norm.feeds) and not norm.name.startswith(f"{path}."):
                        parent, _, name = norm.name.rpartition(".")
                        place = self._model.get_submodule(parent)
                        self._replace(place, name, _Unread(once, place.get_submodule(name)))

    def advance(self, block: Block, *, last: bool = False) -> None:
        """Run `block` as it is now, keep its outputs instead of its inputs, and replace it by a replay.

        `last` says that no later block needs the outputs.
        """
        rest: dict[int, tuple[Any, ...] | None] = {}
        shelf = self.cache.get(block.stack) or _Shelf(self.samples, self.batch_size)

        def keep(_: nn.Module, __: tuple[object, ...], output: Tensor | tuple[Any, ...]) -> None:
            hidden, rest[len(self.tokens)] = _taken_apart(output)
            shelf.put(self.batch, hidden)  # over the input of this batch, which is not needed again
            raise _Stop

        if not last:
            handle = self._model.get_submodule(block.name).register_forward_hook(keep)
            try:
                self._run_all()
            finally:
                handle.remove()
            self.cache[block.stack] = shelf
        self._unsettle()
        self._dense_inputs.clear()
        self._leave()
        self.latest[block.stack] = block
        stack, _, index = block.name.rpartition(".")
        blocks = cast(nn.ModuleList, self._model.get_submodule(stack))
        self._replaced.append((blocks, int(index), blocks[int(index)]))
        blocks[int(index)] = _Replay(self, block, rest)

    def _run_all(self) -> None:
        for number, tokens in enumerate(self._batches):
            self.batch = number
            inputs = model_inputs(self._model, tokens)
            try:
                with fast_matmul():  # here alone: what is done with the statistics is done in full precision
                    self._model(**inputs, use_cache=False)
            except _Stop:
                continue
            raise CalibrationError("a calibrated layer was never run by the model's forward pass")
        release()

    def _replace(self, owner: nn.Module, leaf: str, module: nn.Module) -> None:
        self._settled.append((owner, leaf, owner.get_submodule(leaf)))
        owner.add_module(leaf, module)

    def _unsettle(self) -> None:
        self._inputs.clear()
        for owner, leaf, part in self._settled:
            owner.add_module(leaf, part)
        self._settled.clear()

    def restore(self) -> None:
        """Put every replaced part and block back."""
        self._unsettle()
        self._leave()
        for blocks, index, block in self._replaced:
            blocks[index] = block
        self._replaced.clear()


def _lowered(value: Any) -> Any:
    """`value` with every float32 tensor in it, however deep in tuples and dictionaries, in bfloat16."""
    if isinstance(value, Tensor):
        return value.to(torch.bfloat16) if value.dtype == torch.float32 else value
    if type(value) is tuple:
        return tuple(_lowered(v) for v in value)
    if type(value) is dict:
        return {k: _lowered(v) for k, v in value.items()}
    return value


def _parts(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, str]]:
    """The children of a block, lists looked through: their owner, their name in it, and their path."""
    for leaf, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _parts(child, f"{path}.{leaf}")
        else:
            yield module, leaf, f"{path}.{leaf}"


def model_inputs(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """`tokens` (`[batch, length]`) as keyword arguments of `model`.

    An encoder-decoder reads the first half of every window with its encoder and the second half with its decoder.
    """
    tokens = tokens.to(next(p.device for p in model.parameters() if p.device.type != "meta"))
    if not cast(Any, model).config.is_encoder_decoder:
        return {"input_ids": tokens}
    half = tokens.shape[1] // 2
    return {"input_ids": tokens[:, :half], "decoder_input_ids": tokens[:, half : 2 * half]}


def image_inputs(model: nn.Module, tokens: Tensor) -> dict[str, Tensor] | None:
    """`model_inputs` with an image of noise, always the same one, before the tokens of each window; None where the
    model takes no images, or in another way than LLaVA's: a token for each patch that its vision tower makes."""
    config: Any = cast(Any, model).config
    if "vision_config" not in vars(config) or not hasattr(config, "vision_feature_select_strategy"):
        return None
    vision, image = config.vision_config, int(config.image_token_id)
    patches = (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    text = tokens.where(tokens != image, (image + 1) % config.get_text_config().vocab_size)
    inputs = model_inputs(model, torch.cat([torch.full((len(text), patches), image), text], 1))
    shape = len(text), vision.num_channels, vision.image_size, vision.image_size
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {**inputs, "pixel_values": pixels.to(inputs["input_ids"].device, dtype)}


@contextmanager
def calibration_stream(
    model: nn.Module, modelmap: ModelMap, tokens: Tensor, *, batch_size: int = 4
) -> Iterator[CalibrationStream]:
    """A `CalibrationStream` of `tokens` (`[samples, length]`, no padding) at the door of the model's first block.

    The model is in evaluation mode inside, without gradients; all its blocks are back in their places at the end, and
    every module is in the mode it was in, whatever happens. Raises `CalibrationError` when a token is not in the
    vocabulary.
    """
    vocabulary = modelmap.sizes[Space.VOCAB]
    least, greatest = int(tokens.min()), int(tokens.max())
    if least < 0 or greatest >= vocabulary:
        raise CalibrationError(
            "a calibration token is not in the model's vocabulary",
            got=least if least < 0 else greatest,
            wanted=f"0 to {vocabulary - 1}",
            remedy="tokenise with the model's own tokenizer",
        )
    modes = {name: module.training for name, module in model.named_modules()}
    stream = CalibrationStream(model.eval(), modelmap.norms, tokens, batch_size)
    try:
        with torch.no_grad():
            yield stream
    finally:
        stream.restore()
        for name, module in model.named_modules():  # by name: a linear may have been replaced meanwhile
            module.training = modes.get(name, module.training)
