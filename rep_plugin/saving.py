"""Models of any framework as a folder: what was done to them and their weights, nothing pickled.

The folder holds ``config.json`` and ``model.safetensors``. Where a framework builds a model by name and arguments, it
registers itself in BUILDERS, and the folder alone is enough; otherwise the user's code builds the model, and what was done
to it is repeated on that.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from rep_plugin import depth as depth  # these three register how their steps are repeated
from rep_plugin import pruning as pruning
from rep_plugin import reparam as reparam
from rep_plugin.arguments import Dims, checked, fits, shown
from rep_plugin.checkpoints.files import write_contents
from rep_plugin.checkpoints.plain import read_json
from rep_plugin.checkpoints.safe_load import load_safetensors
from rep_plugin.checkpoints.strict import require_fit
from rep_plugin.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointMismatchError,
    EquivalenceError,
    RepPluginError,
    UnreadableCheckpointError,
    first_line,
)
from rep_plugin.history import CHANGED, changes, check_history, history_of, rebuild_, start_of
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.forward import require_bare
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.rebuilt import check_fingerprint, fingerprint_of
from rep_plugin.measure.verify import default_inputs
from rep_plugin.optional import require

CONFIG, WEIGHTS, ARCHITECTURE, PROOF = "config.json", "model.safetensors", "rep_plugin_rebuilt", "fingerprint"
OLD_ARCHITECTURE = "rep_rebuilt"  # of folders written before 0.2
Images = Annotated[Tensor, Dims("(N, C, H, W)")]


class Builder(NamedTuple):
    """How a framework's own models are saved and built again.

    Args:
        describe: returns the config of a model that was proven to be built again, given images for that or None; None for
            another framework's. It raises an error of ours for one that cannot be built again by name.
        load: builds the model in a folder, with its weights.
    """

    describe: Callable[[nn.Module, Tensor | None], dict | None]
    load: Callable[[Path], nn.Module]


BUILDERS: dict[str, Builder] = {}


@checked
@private_random()
def save(model: nn.Module, folder: str | Path, example_input: Images | None = None) -> None:
    """Write a model that was expanded, pruned or merged, in any order, so that :func:`load` gives the very same one back.

    The folder of a timm model, ``features_only`` ones included, is what ``timm.create_model('local-dir:FOLDER')`` loads too.
    For other models (torchvision, segmentation_models_pytorch, your own) it holds what was done to them, and :func:`load`
    needs a freshly built one. A replaced classifier, or another replaced plain layer, is among what was done. Older files
    stay where an error is raised.

    What timm builds is built again first, and must give the same output of every module, bit by bit. Of other models the
    constants of layers and a few numbers of each output are stored, and :func:`load` refuses a model that gives others.

    Args:
        model: not wrapped (DDP), not compiled.
        folder: where ``config.json`` and ``model.safetensors`` go.
        example_input: images (N, C, H, W) that the model takes, where it takes none of its first convolution's channels
            and 64x64 pixels, or of ``pretrained_cfg['input_size']``.

    Raises:
        ArgumentError: the model was changed by hand in a way that cannot be repeated, or is wrapped. It names the layer.
        EquivalenceError: what timm builds again computes something else: a hook, a replaced forward, an attribute that was
            changed. It names the first module that differs. Or a model of timm takes none of the inputs.
        OSError: a file cannot be written.

    Example:
        >>> import rep_plugin, torch
        >>> build = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
        >>> expanded, _ = rep_plugin.expand(build().eval(), "dbb")
        >>> rep_plugin.save(expanded, "saved")
        >>> type(rep_plugin.load("saved", model=build())[0]).__name__
        'DBBConv2d'
    """
    write_folder(folder, _config_of(model, example_input), model)


@checked
@private_random()
def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the model that :func:`save` wrote: the same structure, the same weights, bit by bit.

    Args:
        folder: what :func:`save` or ``save_timm`` wrote.
        model: one built as the saved one was before its first step; its weights do not matter. It is changed in place (use
            what is returned: merging may replace the root), and stays as it was where an error is raised. Not needed where
            timm builds the model.

    Returns:
        The model, in the mode of ``model``; one that timm builds is in train mode, as timm's are.

    Raises:
        ArgumentError: ``model`` is needed.
        CheckpointMismatchError: the folder does not fit ``model``, or ``model`` computes something else than the saved one
            did; it names the layer.
        UnreadableCheckpointError: a file is torn.
        FileNotFoundError: the folder or one of its files does not exist.

    Example:
        >>> import rep_plugin, timm
        >>> net, _ = rep_plugin.reparameterize(timm.create_model("rep_mobilenetv2_035", num_classes=2).eval())
        >>> rep_plugin.save(net, "saved")
        >>> rep_plugin.load("saved").num_classes
        2
    """
    folder = Path(folder)
    config = read_config(folder)
    arguments = config["model_args"]
    if model is None:
        if not arguments.get("base"):
            raise ArgumentError(_needs_model(folder, config))
        require("timm", "timm", str(folder))
        return BUILDERS["timm"].load(folder)
    require_bare(model)
    state = read_weights(folder)
    try:
        steps = _steps_for(model, config)
        rehearsed = rebuild_(copy_model(model), steps)
        require_fit(rehearsed, state, WEIGHTS)
        if PROOF in config:  # not in those written before 0.2
            check_fingerprint(load_weights_(rehearsed, state), config[PROOF])
    except RepPluginError as error:
        kind = str(config.get("model", arguments.get("base"))).rpartition(".")[2]
        raise CheckpointMismatchError(
            f"{folder} (a {kind}) does not fit this {type(model).__name__}, which must be built as the saved one was before "
            f"its first step: {first_line(error)}"
        ) from error
    return load_weights_(rebuild_(model, steps), state)


def _steps_for(model: nn.Module, config: Mapping) -> list[dict]:
    """What makes the saved model of a fresh one: layers that were replaced before the first step, and the history."""
    own, steps = json.loads(json.dumps(history_of(model))), config["model_args"].get("history", [])
    check_history(steps)
    if steps[: len(own)] != own:
        raise ArgumentError(f"{len(own)} steps were done to it already, others than to the saved one")
    there, start = start_of(model), config.get("layers", {})
    both = {name: _stable(there[name]) for name in start if name in there}
    replaced = changes(both, {name: start[name] for name in both})
    if replaced and replaced[0]["step"] == CHANGED:
        raise ArgumentError(f"in this one, then in the saved one, {replaced[0]['what']}")
    for (
        step
    ) in replaced:  # a classifier alone is put in place: any other layer says that the fresh model is another one
        kinds = both[step["layer"]]["kind"] if isinstance(both[step["layer"]], dict) else "", step["by"]["kind"]
        if "Linear" not in kinds:
            layer = step["layer"]
            raise ArgumentError(f"{layer!r} is {both[layer]} in this one, and {start[layer]} in the saved one")
    return [*replaced, *steps[len(own) :]]


def _needs_model(folder: Path, config: Mapping) -> str:
    why = f" ({config['why']})" if config.get("why") else ""
    return (
        f"{folder} holds a {config.get('model')}, which is not built by name{why}: rep_plugin.load({str(folder)!r}, "
        "model=one built as before its first step)"
    )


def inputs_for(model: nn.Module, example_input: Tensor | None, history: Sequence[Mapping] = ()) -> Iterator[Tensor]:
    """Yield images that a model may take, two of each guess: one of an odd size too.

    Args:
        model: the model.
        example_input: the only ones, where given.
        history: its steps; plans of pruning know what was traced.

    Returns:
        The images.
    """
    yield from default_inputs(model, example_input)
    for step in history if example_input is None else ():
        shape = step["plan"].get("input_shape", ()) if isinstance(step.get("plan"), Mapping) else ()
        if len(shape) == 4:
            yield from default_inputs(model, torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(0)))


def _config_of(model: nn.Module, example_input: Tensor | None) -> dict:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    require_bare(model)
    history = history_of(model)
    check_history(history)
    why = ""
    for builder in BUILDERS.values():
        try:
            if (config := builder.describe(model, example_input)) is not None:
                return config
        except EquivalenceError:
            raise
        except RepPluginError as error:  # it is then saved as one that the user builds
            why = first_line(error)
    kind = type(model)
    return {
        "architecture": ARCHITECTURE,
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "why": why,
        "layers": {name: _stable(layer) for name, layer in start_of(model).items()},
        "model_args": {"base": "", "base_args": {}, "history": history},
        "pretrained_cfg": {},
        PROOF: fingerprint_of(model, inputs_for(model, example_input, history)),
    }


def _stable(layer: Any) -> Any:
    """A layer as every version of torch describes it: plain layers and BNs are described by us, of others the class stays."""
    kind = "" if isinstance(layer, dict) else layer.partition("(")[0]
    return layer if not kind or kind.endswith(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")) else kind


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict as safetensors writes it. Raises ArgumentError for what is no tensor, by name."""
    state = model.state_dict()
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ArgumentError(f"the state of {other[0]!r} is a {type(state[other[0]]).__name__}, expected tensors alone")
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def write_folder(folder: str | Path, config: Mapping, model: nn.Module) -> None:
    """Write both files of a model, or none.

    Args:
        folder: their folder.
        config: content of ``config.json``.
        model: the model.
    """
    text = json.dumps({key: value for key, value in config.items() if key != PROOF}, indent=1)
    if PROOF in config:  # long, and for no reader's eyes: one line
        text = f"{text[:-2]},\n {json.dumps(PROOF)}: {json.dumps(config[PROOF])}\n}}"
    contents = {WEIGHTS: safetensors.save(state_of(model)), CONFIG: text.encode()}
    write_contents(Path(folder), contents)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config in a folder. Raises UnreadableCheckpointError, or FileNotFoundError, where there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a folder that rep_plugin.save wrote")
    try:
        config = read_json(path)
    except ArgumentError as error:
        raise UnreadableCheckpointError(str(error)) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_args"), dict):
        raise UnreadableCheckpointError(f"{path} has no model_args, expected what rep_plugin.save writes")
    if (architecture := config.get("architecture")) not in (ARCHITECTURE, OLD_ARCHITECTURE):
        raise UnreadableCheckpointError(f"{path}: architecture is {shown(architecture)}, expected {ARCHITECTURE!r}")
    if not fits(config.get("pretrained_cfg", {}), dict[str, Any]):
        raise UnreadableCheckpointError(f"{path}: pretrained_cfg is {shown(config['pretrained_cfg'])}, expected a dict")
    kinds = {"base": str, "base_args": dict[str, Any], "history": list[dict]}
    for name, kind in kinds.items():
        if not fits(config["model_args"].get(name, kind()), kind):
            got = shown(config["model_args"][name])
            raise UnreadableCheckpointError(f"{path}: model_args.{name} is {got}, expected what rep_plugin.save writes")
    if not fits(config.get("layers", {}), dict[str, Any]):
        raise UnreadableCheckpointError(f"{path}: layers is {shown(config['layers'])}, expected a dict")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights in a folder. Raises UnreadableCheckpointError, or FileNotFoundError, where there are none."""
    return load_safetensors(folder / WEIGHTS)


def load_weights_(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load weights as they are, in the dtype that they have, which torch alone would round to the model's.

    Args:
        model: that they fit, see :func:`rep_plugin.checkpoints.strict.require_fit`.
        state: its state dict.

    Returns:
        The model.
    """
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floats) == 1:
        model.to(dtype=floats.pop())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    model.load_state_dict(state)
    return model
