"""What each step does to a model: the methods, given data and told where to report. Nothing here decides an order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from torch import Tensor, nn

from slimtune.arch import bind
from slimtune.calib.data import calibration_tokens, text_tokens
from slimtune.calib.formats import Conversation, normalise, render
from slimtune.calib.gradients import Batch
from slimtune.calib.outliers import Outliers, outliers
from slimtune.calib.rows import DataSource, is_text, read_rows, read_text
from slimtune.evaluate.accuracy import accuracy
from slimtune.evaluate.inference import require_vocabulary
from slimtune.evaluate.perplexity import perplexity
from slimtune.evaluate.rouge import rouge
from slimtune.evaluate.speed import speed
from slimtune.evaluate.tasks import tasks
from slimtune.export import ADAPTERS, Source, export
from slimtune.export.load import DTYPES, Loaded, load, locate
from slimtune.export.stream import rotate_folder
from slimtune.hub import round_cache_
from slimtune.lora.attach import base_of, has_adapter, plain
from slimtune.lora.inits import INITS, WORDS, residual
from slimtune.lora.merge import merge
from slimtune.prune.options import PruneOptions
from slimtune.quant.apply import Start, quantize_
from slimtune.quant.linear import QuantLinear
from slimtune.quant.size import Size, model_size
from slimtune.recipe.adapters import base_name, belongs
from slimtune.recipe.blocks import FolderStore
from slimtune.recipe.gradients import (
    attach_adapter,
    gradient_batches,
    gradients_of,
    sketch_file,
    wants_data,
    wants_gradients,
    wants_residual,
)
from slimtune.recipe.merging import merge_low_bit
from slimtune.recipe.plan import CALIBRATION_BATCH, DEFAULT_SAMPLES, calibration_source
from slimtune.recipe.pruning import cost_of, needs_data, pending, prune_now, record
from slimtune.recipe.schema import Evaluate, Export, Lora, Merge, Prune, Quantize, Recipe, Rotate, Step, Train
from slimtune.recipe.training import examples_of, train_now, within_positions
from slimtune.recipe.treatments import Treatments
from slimtune.rotate.fuse import RotateFacts, rotate_
from slimtune.rotate.online import attach_online_
from slimtune.train.data import Collator, padding_id
from slimtune.train.options import TrainOptions

Facts = dict[str, Any]

OUTLIER_WINDOWS = 4, 512
"""Windows, and tokens in each at most, on which a rotate step looks at activations."""

OUTLIER_ROWS = 4000
"""Rows of the data, from the first on, that these windows are cut from."""

LEARNED_WINDOWS = 16
"""Windows from which a rotation is learned or balanced, at most."""

WHEN = ("before", "after")


@dataclass
class Session:
    """A recipe on its way: the model as it is, where things are kept, and whom to tell."""

    recipe: Recipe
    loaded: Loaded
    model: nn.Module
    say: Callable[[str], None]
    folder: Path | None = None
    resume: bool = False
    metrics: list[Facts] = field(default_factory=list)
    pruning: Facts | None = None  # what pruning.json says of the model

    def whole(self) -> nn.Module:
        """The model with all its weights in memory."""
        self.loaded.materialise_()
        return self.model

    def place(self, name: str) -> Path | None:
        """A folder under `checkpoints/`, where the run has a folder."""
        return self.folder / "checkpoints" / name if self.folder else None


def run_step(session: Session, step: Step, number: int) -> Facts:
    """Do one step; `session.model` is the result. Returns the facts for the report."""
    match step:
        case Rotate():
            return _rotate(session, step, number)
        case Prune():
            return _prune(session, step)
        case Quantize():
            return _quantize(session, step, number)
        case Lora():
            return _lora(session, step, number)
        case Train():
            return _train(session, step, number)
        case Merge():
            return _merge(session, step)
        case Evaluate():
            return _evaluate(session, step, number)
        case Export():
            return _export(session, step, number)


def size_of(model: nn.Module) -> Size:
    """The size of a model as it is, adapter aside."""
    return model_size(plain(model), frozenset(port.name for port in bind(model).linears))


def _rotate(session: Session, step: Rotate, number: int) -> Facts:
    model, data = session.model if step.stream else session.whole(), session.recipe.data
    modelmap = bind(model)
    source = data.calibration or data.train or DataSource(builtin="pydocs")
    length = within_positions(model, min(source.length, OUTLIER_WINDOWS[1]))
    samples = OUTLIER_WINDOWS[0] + (LEARNED_WINDOWS if step.calibrated else 0)
    rows, tokenizer = read_rows(source)[:OUTLIER_ROWS], session.loaded.tokenizer
    windows = calibration_tokens(rows, tokenizer, samples, length, session.recipe.seed, str(source))
    require_vocabulary(session.loaded.model, windows, str(source))
    tokens = windows[: OUTLIER_WINDOWS[0]]  # looked at, not learnt from, where there are others
    rest = windows[OUTLIER_WINDOWS[0] :] if len(windows) > OUTLIER_WINDOWS[0] else tokens
    with session.loaded.blocks_on_demand():
        before = outliers(model, modelmap, tokens)
    if step.stream:
        result = _rotate_folder(session, step, number, rest)
    else:
        result = rotate_(model, modelmap, step.rotation, tokens=rest)
    with session.loaded.blocks_on_demand():
        after = outliers(session.model, modelmap, tokens)
    for part in ("residual", "values"):
        session.say(f"  {part}: {getattr(result, part)}")
    if result.balanced:
        session.say(f"  channels balanced in {result.balanced} places")
    session.say(f"  logits differ by {result.logit_error:.1e}, relative to their size")
    facts = outlier_facts(before, after)
    session.say(f"  mean kurtosis of linear inputs {facts['kurtosis_before']:.3g} -> {facts['kurtosis_after']:.3g}")
    return {**result.to_dict(), "windows": {"source": str(source), "samples": len(tokens), "length": length}, **facts}


def _rotate_folder(session: Session, step: Rotate, number: int, tokens: Tensor) -> RotateFacts:
    """Rotate the session's model, which is in no adapter's way, to where `run` looks for the step's result."""
    place, old = session.place(f"step-{number}-model"), session.loaded
    assert place is not None, "a recipe runs in a folder"
    result = rotate_folder(old, place, step.rotation, tokens=tokens, progress=_done(session, "part"))
    session.loaded = replace(load(str(place), dtype=session.recipe.dtype, lazy=True), name=old.name)
    session.model = session.loaded.model
    return result


def outlier_facts(before: dict[str, Outliers], after: dict[str, Outliers]) -> Facts:
    """What a change did to the inputs of all linears, and a picture of the one that was most uneven."""
    layers: list[Facts] = [
        {
            "name": name,
            "kurtosis_before": was.kurtosis,
            "kurtosis_after": after[name].kurtosis,
            "peak_before": was.peak,
            "peak_after": after[name].peak,
        }
        for name, was in before.items()
    ]
    worst = max(before, key=lambda name: before[name].kurtosis)
    return {
        **{f"kurtosis_{when}": fmean(layer[f"kurtosis_{when}"] for layer in layers) for when in WHEN},
        "layers": layers,
        "channels": {
            "name": worst,
            "before": list(before[worst].channels),
            "after": list(after[worst].channels),
        },
    }


def _quantize(session: Session, step: Quantize, number: int) -> Facts:
    treatments = Treatments(step)
    modelmap = bind(session.model)
    facts: Facts = {"method": step.method, **step.options}
    if step.activations:
        facts["activations"] = step.activations
    if step.kv_cache:
        facts["kv_cache"] = step.kv_cache
        round_cache_(session.loaded.model, treatments.cache.bits)
    start = _start(session.recipe.steps[number + 1 :])
    weighed = start is not None and session.recipe.data.calibration is not None  # what is lost, by those inputs
    tokens, source = _calibration(session) if treatments.need_data or weighed else (None, {})
    place = session.place(f"step-{number}-blocks")
    result = quantize_(
        session.model,
        modelmap,
        treatments.choose,
        activations=treatments.rounds,
        tokens=tokens,
        batch_size=CALIBRATION_BATCH,
        materialise=session.loaded.materialise,
        store=FolderStore(place) if place is not None else None,
        start=start,
        progress=_done(session, "block"),
    )
    session.loaded.materialise_()
    attach_online_(session.model)
    return {**facts, **source, **result.to_dict()}


def _calibration(session: Session) -> tuple[Tensor, Facts]:
    """The recipe's calibration windows, and the facts of them."""
    source = calibration_source(session.recipe)
    session.say(f"  calibrating on {source}")
    tokens = calibration_tokens(
        read_rows(source),
        session.loaded.tokenizer,
        samples=source.samples or DEFAULT_SAMPLES,
        length=within_positions(session.model, source.length),
        seed=session.recipe.seed,
        where=str(source),
    )
    require_vocabulary(session.loaded.model, tokens, str(source))
    if len(tokens) < (source.samples or 0):
        session.say(f"  it has {len(tokens):,} windows of {tokens.shape[1]} tokens, all used, not {source.samples:,}")
    return tokens, {"calibration": {"source": str(source), "samples": tokens.shape[0], "length": tokens.shape[1]}}


def _prune(session: Session, step: Prune) -> Facts:
    facts: Facts = {f.name: getattr(step, f.name) for f in fields(PruneOptions)}
    if step.ramped:
        session.say("  acts along the train step that follows")
        return {**facts, "acts": "in the next train step"}
    tokens, source = _calibration(session) if needs_data(step) else (None, {})
    model = session.whole()
    before = cost_of(model)
    facts |= source | prune_now(model, step, tokens, seed=session.recipe.seed, progress=_done(session, "batch"))
    facts["cost"] = {"before": before, "after": cost_of(model)}
    _record(session, facts)
    return facts


def _merge(session: Session, step: Merge) -> Facts:
    if not step.keep_bits:
        session.model = merge(session.whole(), DTYPES[step.dtype or session.recipe.dtype])
        return {"dtype": step.dtype or session.recipe.dtype}
    data, model = session.recipe.data, session.whole()
    tokens, source = _calibration(session) if data.calibration or data.train else (None, {})
    session.model, facts = merge_low_bit(
        model, tokens, tolerance=step.tolerance, force=step.force, progress=_done(session, "block")
    )
    return {"keep_bits": True, "tolerance": step.tolerance, **source, **facts}


def _record(session: Session, facts: Facts) -> None:
    """Note what was cut, and say it."""
    folder = locate(session.recipe.model)[0] if session.pruning is None else None
    session.pruning = record(facts, session.pruning, session.loaded.name, folder)
    del facts["kept"]  # pruning.json has them
    widths = {axis["kind"]: f"{axis['kept']} of {axis['units']} {axis['kind']}" for axis in facts["axes"]}
    session.say(
        f"  {facts['parameters_before']:,} -> {facts['parameters_after']:,} parameters, "
        f"{facts['removed_ratio']:.1%} of the {facts['of']} gone; kept {', '.join(widths.values())}"
    )


def _done(session: Session, what: str) -> Callable[[int, int], None]:
    def progress(done: int, all: int) -> None:
        if done == all or done % max(all // 6, 1) == 0:
            session.say(f"  {what} {done}/{all}")

    return progress


def _start(later: Sequence[Step]) -> Start | None:
    """How the adapter that comes next starts, where that is found while quantizing."""
    lora = next((step for step in later if isinstance(step, Lora)), None)
    if lora is None or not wants_residual(lora):
        return None
    start, rank = INITS[lora.init].start or residual, lora.r
    return lambda weight, base, stats: start(weight, base, rank, stats)


def _recall_starts_(session: Session, number: int) -> None:
    """Give the quantized layers of a resumed run what the quantize step before step `number` kept for them."""
    quantized = max(n for n, step in enumerate(session.recipe.steps[:number]) if isinstance(step, Quantize))
    place = session.place(f"step-{quantized}-blocks")
    assert place is not None, "a run that is resumed has a folder"
    for block in bind(session.model).blocks:
        for layer in FolderStore(place).load(block) or ():
            cast(QuantLinear, session.model.get_submodule(layer.name)).start = layer.start


def _lora(session: Session, step: Lora, number: int) -> Facts:
    if wants_residual(step) and session.resume:
        _recall_starts_(session, number)
    seed, gradients = session.recipe.seed, None
    batches: list[Batch] = []
    if wants_gradients(step):
        place, checkpointing = session.place(f"step-{number}-lora"), False
        file = sketch_file(step) or (place / "sketch.safetensors" if place is not None else None)
        if file is not None and file.exists():
            session.say(f"  {WORDS[INITS[step.init].of]} from {file}")
        if wants_data(step, file):
            batches, checkpointing = _gradient_batches(session, step, number)
        gradients = gradients_of(session.whole(), batches, step, seed=seed, checkpointing=checkpointing, file=file)
    name = base_name(session.recipe, number, session.folder, session.loaded.name)
    model, facts = attach_adapter(session.whole(), step, gradients, batches, base_name=name, seed=seed)
    if found := facts.get("search"):
        session.say(f"  a step of {found['size']:g}: loss {found['before']:.4f} before, {found['after']:.4f} after")
    session.model = model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    targets = sorted(cast(Any, model).peft_config["default"].target_modules)
    session.say(f"  {trainable:,} trainable parameters on {', '.join(targets[:8])}{' ...' if len(targets) > 8 else ''}")
    return {
        "init": step.init,
        "r": step.r,
        "lora_alpha": step.lora_alpha,
        "targets": targets,
        "trainable_parameters": trainable,
        **facts,
    }


def _gradient_batches(session: Session, step: Lora, number: int) -> tuple[list[Batch], bool]:
    """Of the training data, as the train step that comes next will see it; and whether that recomputes activations."""
    data, model = session.recipe.data, session.whole()
    assert data.train is not None, "the plan has checked it"
    later = session.recipe.steps[number + 1 :]
    options: TrainOptions = next((s for s in later if isinstance(s, Train)), TrainOptions())
    tokenizer = session.loaded.tokenizer
    examples, _ = examples_of(model, tokenizer, data.train, options)
    collator, size = Collator(padding_id(tokenizer)), options.per_device_train_batch_size
    batches = gradient_batches(examples, collator, step, size, session.recipe.seed, str(data.train))
    session.say(f"  {WORDS[INITS[step.init].of]} of {len(batches)} batches of {data.train}")
    return batches, options.gradient_checkpointing


def _train(session: Session, step: Train, number: int) -> Facts:
    data = session.recipe.data
    assert data.train is not None, "the plan has checked it"
    model = session.whole()
    tokenizer = session.loaded.tokenizer
    examples, facts = examples_of(model, tokenizer, data.train, step)
    held_out = examples_of(model, tokenizer, data.eval, step)[0] if data.eval is not None else []
    session.say(
        f"  {facts['examples']:,} examples from {data.train}, {facts['tokens']:,} tokens; the first, «not learnt»:"
    )
    session.say("  | " + str(facts["sample"]).replace("\n", "\n  | "))
    ramp = pending(session.recipe.steps, number)
    result = train_now(
        model,
        tokenizer,
        examples,
        step,
        held_out=held_out,
        seed=session.recipe.seed,
        ramp=ramp,
        windows=_calibration(session)[0] if ramp is not None and ramp.refit else None,
        log=session.folder / "train_log.jsonl" if session.folder else None,
        checkpoints=session.place(f"step-{number}-train"),
        resume=session.resume,
        number=number,
        progress=lambda line: session.say("  " + _log_line(line)),
    )
    if result.prune is not None:
        _record(session, result.prune)
    return {**result.to_dict(), "sample": facts.pop("sample"), "data": {"source": str(data.train), **facts}}


def _log_line(line: Facts) -> str:
    if "eval_loss" in line:
        return f"step {line['step']}: held-out loss {line['eval_loss']:.4f}"
    minutes, seconds = divmod(int(line["seconds_left"]), 60)
    return (
        f"step {line['step']}/{line['steps']}: loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s, "
        f"peak {line['peak_rss_bytes'] / 1e9:.2f} GB, {minutes}:{seconds:02d} left"
    )


def _evaluate(session: Session, step: Evaluate, number: int) -> Facts:
    model = cast(Any, session.whole())
    found: list[Facts] = []
    for name, source in step.perplexity.items():
        tokens = text_tokens(_text(session, source), session.loaded.tokenizer)
        result = perplexity(model, tokens[: step.max_tokens] if step.max_tokens > 0 else tokens, length=step.length)
        found.append(
            {"name": f"{name}_perplexity", "value": result.value, "tokens": result.tokens, "length": result.length}
        )
    for name, source in step.accuracy.items():
        scored = accuracy(model, session.loaded.tokenizer, _some_rows(source, step.limit), where=str(source))
        found.append({"name": f"{name}_accuracy", "value": scored.value, "samples": scored.samples})
        found.append({"name": f"{name}_majority", "value": scored.majority, "samples": scored.samples})
    for name, source in step.rouge.items():
        pairs = _some_rows(source, step.limit)
        f1 = rouge(model, session.loaded.tokenizer, pairs, max_new_tokens=step.max_new_tokens, where=str(source))
        found += [{"name": f"{name}_{kind}", "value": value, "samples": len(pairs)} for kind, value in f1.items()]
    if step.tasks:
        limit = step.limit if step.limit > 0 else None
        shots = step.num_fewshot if step.num_fewshot >= 0 else None
        for item in tasks(model, session.loaded.tokenizer, step.tasks, limit=limit, num_fewshot=shots):
            name = f"{item.task}_{item.metric}"
            found.append({"name": name, "value": item.value, "stderr": item.stderr, "samples": item.samples})
    if step.speed:
        # As long a prompt as others use, where the model has the positions for it and the reply.
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        measured = speed(model, prompt_tokens=max(1, min(512, positions - 32)), new_tokens=32)
        found.append({"name": "prefill_tokens_per_second", "value": measured.prefill_tokens_per_second})
        found.append({"name": "decode_tokens_per_second", "value": measured.decode_tokens_per_second})
    size = size_of(session.model)
    found.append({"name": "bytes", "value": size.bytes})
    found.append({"name": "bits_per_weight", "value": size.bits_per_weight})
    for fact in found:
        session.metrics.append({"after_step": number, **fact})
        session.say(f"  {fact['name'].replace('_', ' ')}: {fact['value']:,.4g}")
    return {}


def _some_rows(source: DataSource, limit: int) -> list[Conversation]:
    rows = read_rows(source)[: source.samples][: limit if limit > 0 else None]
    return normalise(rows, where=str(source))


def _text(session: Session, source: DataSource) -> str:
    """A text file as it is; rows of anything else rendered one after the other."""
    if source.path and is_text(source.path):
        return read_text(source.path)
    conversations = normalise(read_rows(source), where=str(source))[: source.samples]
    return "".join(render(c, session.loaded.tokenizer, str(source)) for c in conversations)


def _export(session: Session, step: Export, number: int) -> Facts:
    assert session.folder is not None, "a run has a folder"
    model = session.whole()
    dtype = cast(Any, base_of(model)).dtype  # the recipe's, or the last merge's
    name = session.loaded.name
    if step.format in ADAPTERS:
        name = base_name(session.recipe, number, session.folder, name)
    note = belongs(session.recipe, number) if has_adapter(model) else ""
    source = Source(model, session.loaded.tokenizer, name, dtype, note)
    rank = f"rank-{step.rank}" if step.rank else ""
    place = f"export/{'-'.join(filter(None, (step.format, step.quantization, rank)))}"
    manifest = export(source, step.format, session.folder / place, step.quantization, step.rank)
    if "error" in manifest.facts:
        session.say(f"  cut to rank {step.rank}: {manifest.facts['error']:.2g} of the update is lost")
    session.say(f"  {manifest.path}: {manifest.bytes / 1e6:,.1f} MB, read back and compared")
    return manifest.to_dict() | {"path": place}
