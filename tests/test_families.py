"""Every family of pipelines, in tiny form: replayed to the bit, differentiated, trained, saved and loaded by plain diffusers.

A row of `families.FAMILIES` is a test here and a line of docs/pipelines.md.
"""

import importlib.util
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import BaseGuidance, ClassifierFreeGuidance, LTX2Guidance, ModularPipeline
from families import FAMILIES
from peft import LoraConfig
from transformers import TrainerCallback

from diffusers_adjoint import AdjointMatchingConfig, AdjointMatchingTrainer, memoryless_scheduler
from diffusers_adjoint.model.denoiser import PipelineDenoiser
from diffusers_adjoint.model.lora import add_lora
from diffusers_adjoint.replay import PipelineReplay

STEPS = 4
SEEDS = (1, 2)


@pytest.fixture(params=[pytest.param(f, marks=() if f.fast else pytest.mark.slow, id=f.name) for f in FAMILIES])
def family(request, monkeypatch):
    if request.param.one_sample:
        monkeypatch.setitem(globals(), "SEEDS", SEEDS[:1])
    return request.param


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def columns_of(family):
    return {name: values[: len(SEEDS)] for name, values in family.columns.items()}


def prepared(pipeline, family):
    replay = PipelineReplay(
        pipeline,
        memoryless_scheduler(pipeline.scheduler),
        STEPS,
        guidance_scale=family.guidance_scale,
        pipeline_kwargs=family.kwargs,
        component=family.component,
    )
    replay.find_state(columns_of(family), generators())
    return replay, *replay.prepare(columns_of(family), generators())


def component_of(pipeline, family):
    return family.component or ("transformer" if getattr(pipeline, "transformer", None) is not None else "unet")


def denoisers(pipeline):
    return [getattr(pipeline, name, None) for name in ("transformer", "transformer_2", "unet")]


def modules(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def parameters(pipeline):
    """Every parameter of every component, by component and name."""
    return {f"{part}.{name}": p for part, module in modules(pipeline).items() for name, p in module.named_parameters()}


@dataclass
class Step:
    model_output: torch.Tensor
    sample: torch.Tensor
    prev_sample: torch.Tensor
    calls: int  # of the denoisers, since the step before


def call_arguments(family, **changes):
    """As a user writes it, also one who has a single image and a single prompt."""
    columns = {name: values[0] if is_bare(values[0]) else values for name, values in columns_of(family).items()}
    scale = {} if family.scale is None else {family.scale: family.guidance_scale}
    batch = {} if columns else {"batch_size": len(SEEDS)}
    form = {"return_dict": False} if family.output is None else {"output": family.output}
    ours = {"num_inference_steps": STEPS, "output_type": "pt", **form}
    ours["generator"] = generators() if len(SEEDS) > 1 else generators()[0]
    return {**family.kwargs, **columns, **scale, **batch, **ours, **changes}


def is_bare(value):
    return len(SEEDS) == 1 and not isinstance(value, int)


def set_guiders(pipeline, family):
    """What a user of a modular pipeline does who wants the guidance of the row."""
    for name, part in pipeline.components.items():
        if isinstance(part, BaseGuidance):
            # One that guides in several ways has its place in the loop, where another cannot stand.
            several = isinstance(part, LTX2Guidance)
            guider = part.new if several else ClassifierFreeGuidance
            pipeline.update_components(**{name: guider(guidance_scale=family.guidance_scale)})


def output_of(pipeline, family):
    """Images, and what is made beside them."""
    if family.output is not None:
        set_guiders(pipeline, family)
    output = pipeline(**call_arguments(family))
    # Stable Video Diffusion forgets the tuple; a modular pipeline gives what is asked of it.
    output = tuple(output.values()) if isinstance(output, dict) else output
    output = (output,) if isinstance(output, torch.Tensor) else output
    assert len(output[0]) == len(SEEDS)
    return output


def images_of(pipeline, family):
    return output_of(pipeline, family)[0]


def count_calls(pipeline):
    calls = []
    for network in denoisers(pipeline):
        if network is not None:
            network.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def ordinary(pipeline, family):
    """The pipeline's public call on a memoryless scheduler: every step, and what it returns."""
    scheduler = memoryless_scheduler(pipeline.scheduler)
    steps, calls = [], count_calls(pipeline)

    class Watched(type(scheduler)):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True, **options):
            # DiT hands its batch over twice, the copy for guidance below it.
            given = model_output[: len(SEEDS)].clone(), sample[: len(SEEDS)].clone()
            out = super().step(given[0], timestep, given[1], generator=generator, **options)
            steps.append((id(self), Step(*given, out.prev_sample.clone(), len(calls))))
            calls.clear()
            out.prev_sample = torch.cat([out.prev_sample] * (len(sample) // len(SEEDS)))
            return out if return_dict else (out.prev_sample,)

    scheduler.__class__ = Watched
    scheduler.set_generator(generators())
    pipeline.scheduler = scheduler
    output = output_of(pipeline, family)
    return of_one_chain(steps), output


def of_one_chain(steps):
    """The steps of several schedulers, which take turns, as those of all their latents one after the other."""
    turn = len({scheduler for scheduler, _ in steps})
    together = [[step for _, step in steps[i : i + turn]] for i in range(0, len(steps), turn)]
    return [joint(parts) if turn > 1 else parts[0] for parts in together]


def joint(parts):
    names = ("model_output", "sample", "prev_sample")
    tensors = [torch.cat([getattr(part, name).flatten(1) for part in parts], 1) for name in names]
    return Step(*tensors, sum(part.calls for part in parts))


def require_made(replay, conditioning, last, output):
    """The same images, and the same sound where there is one."""
    with torch.no_grad():
        images, audio = replay.decode_media(last, conditioning)
    assert torch.equal(images, output[0])
    assert (audio is not None) == replay.makes_audio
    assert audio is None or torch.equal(audio, output[1])


def test_replay_is_the_pipelines_own_call_to_the_bit(family):
    steps, output = ordinary(family.build(), family)
    pipeline = family.build()
    calls = count_calls(pipeline)
    replay, x, conditioning = prepared(pipeline, family)
    calls.clear()
    assert torch.equal(x, steps[0].sample.to(x.dtype))
    assert len(replay.timesteps) == len(steps)
    for index, step in enumerate(steps):
        with torch.no_grad():
            assert torch.equal(replay.predict(step.sample, index, conditioning), step.model_output)
        assert len(calls) == step.calls
        calls.clear()
    require_made(replay, conditioning, steps[-1].prev_sample, output)
    assert len(calls) == 0
    assert output[0].isfinite().all()
    assert output[0].std() > 0


def test_a_single_sample_is_replayed_to_the_bit_too(family, monkeypatch):
    if family.one_sample:
        pytest.skip("is always a single one")
    replay, *_ = prepared(family.build(), family)  # where the state lies is found with two
    monkeypatch.setitem(globals(), "SEEDS", SEEDS[1:])
    family = replace(family, columns={name: values[1:] for name, values in family.columns.items()})
    steps, output = ordinary(family.build(), family)
    _, conditioning = replay.prepare(family.columns, generators())
    for index, step in enumerate(steps):
        with torch.no_grad():
            assert torch.equal(replay.predict(step.sample, index, conditioning), step.model_output)
    require_made(replay, conditioning, steps[-1].prev_sample, output)


def test_every_column_acts(family):
    replay, x, conditioning = prepared(family.build(), family)
    with torch.no_grad():
        output = replay.predict(x, 1, conditioning)
        for name, values in family.columns.items():
            y, other = replay.prepare({**columns_of(family), name: values[::-1][: len(SEEDS)]}, generators())
            # Image to image: the image acts on the start alone.
            change = (replay.predict(x, 1, other) - output).norm() / output.norm() + (y - x).norm() / x.norm()
            assert change > 1e-4, name  # float32 rounding is below 1e-6


def test_derivative_in_the_state(family):
    replay, x, conditioning = prepared(family.build().to(family.dtype), family)
    index = len(replay.timesteps) // 2
    leaf = x.clone().requires_grad_()
    output = replay.predict(leaf, index, conditioning)
    errors = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(x.shape, generator=generator).to(x) * x.norm() / x.numel() ** 0.5
        with torch.no_grad():
            # Along the change itself rounding weighs least; it comes from another evaluation, so it does not share its rounding.
            w = replay.predict(x + 4 * family.step * u, index, conditioning) - output
            far_back, back, ahead, far_ahead = (
                (replay.predict(x + step * family.step * u, index, conditioning).double() * w.double()).sum().item()
                for step in (-2, -1, 1, 2)
            )
        expected = (far_back - 8 * back + 8 * ahead - far_ahead) / (12 * family.step)
        derivative = (torch.autograd.grad(output, leaf, w, retain_graph=True)[0].double() * u.double()).sum().item()
        errors.append(abs(derivative - expected) / abs(expected))
    # In double, parts that networks compute in float32 all the same (rotary embeddings, norms) leave 1e-7 / 1e-3; in float32 both
    # rounding and truncation leave up to 1e-2. A gradient that is missing a part is off by more.
    assert statistics.median(errors) < (1e-3 if family.dtype == torch.float64 else 2e-2)


def lora_config(family):
    return None if family.lora is None else LoraConfig(r=2, lora_alpha=4, target_modules=list(family.lora))


def test_gradients_reach_the_trained_parameters_and_no_other(family):
    pipeline = family.build()
    for part in modules(pipeline).values():
        part.requires_grad_(False)
    replay, x, conditioning = prepared(pipeline, family)
    base_adapters = None
    if family.lora is not None:
        config = lora_config(family)
        config.init_lora_weights = False  # at its usual zero, half of the adapter has no gradient yet
        base_adapters = add_lora(pipeline, replay.component, config)
    denoiser = PipelineDenoiser(replay, base_adapters)
    idle = replay.idle_steps(x, conditioning, guided=True)
    for index in set(range(len(replay.timesteps))) - set(idle):
        denoiser(x, index, conditioning, guided=True).square().sum().backward()
    trained = {name for name, p in parameters(pipeline).items() if p.requires_grad}
    reached = {name for name, p in parameters(pipeline).items() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == trained
    assert all(name.startswith(f"{replay.component}.") for name in trained)
    if idle:
        with torch.no_grad():
            mean = denoiser(x, idle[0], conditioning, guided=True)
            with denoiser.base():
                assert torch.equal(mean, denoiser(x, idle[0], conditioning, guided=True))


def reward(images, prompts):
    assert len(images) == len(SEEDS)
    return images.flatten(1).mean(1)


def make_trainer(family, folder, **changes):
    rows = family.columns or {"prompt": [""] * len(SEEDS)}
    settings = {
        "output_dir": str(folder),
        "num_inference_steps": STEPS,
        "num_loss_steps": 1,
        "reward_scale": 1e4,
        "guidance_scale": family.guidance_scale,
        "pipeline_kwargs": dict(family.kwargs),
        "trained_component": family.component,
        "max_steps": 2,
        "per_device_train_batch_size": len(SEEDS),
        "learning_rate": 5e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "probe_base": False,
    }
    args = AdjointMatchingConfig(**settings | changes)
    dataset = [{name: values[i] for name, values in rows.items()} for i in range(len(SEEDS))]
    return AdjointMatchingTrainer(family.build(), reward, args, dataset, peft_config=lora_config(family))


def load(pipeline, family, folder):
    """What a user does with the saved folder, without this package."""
    component = component_of(pipeline, family)
    if family.lora is None:
        network = getattr(pipeline, component)
        register = pipeline.register_modules if family.output is None else pipeline.update_components
        register(**{component: type(network).from_pretrained(folder / component).eval()})
    elif family.network_lora:
        network = getattr(pipeline, component)
        network.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    elif component == "transformer_2":
        pipeline.load_lora_weights(folder, load_into_transformer_2=True)
    else:
        pipeline.load_lora_weights(folder)
    return pipeline


def test_trained_weights_move_alone_and_load_without_this_package(family, tmp_path):
    trainer = make_trainer(family, tmp_path, learning_rate=0.1)  # far beyond the rounding of images
    before = {name: p.detach().clone() for name, p in parameters(trainer.pipeline).items()}
    trainer.train()
    after = parameters(trainer.pipeline)
    moved = {name for name, p in after.items() if not torch.equal(p.detach(), before[name])}
    trained = {name for name, p in after.items() if p.requires_grad}
    assert moved
    assert moved == trained
    trainer.save_model(tmp_path)

    with torch.no_grad():
        tuned = images_of(trainer.pipeline, family)
        loaded = images_of(load(family.build(), family, tmp_path), family)
        base = images_of(family.build(), family)
    change = (tuned - base).abs().max()
    assert change > 1e-4
    # Rounding: sums run in another order where the adapter is applied otherwise, or where loaded weights lie otherwise in memory.
    assert (loaded - tuned).abs().max() < 1e-2 * change


class CountRows(TrainerCallback):
    """Rows of every denoiser call, in training proper."""

    def __init__(self, trainer):
        self.rows = []
        for network in denoisers(trainer.pipeline):
            if network is not None:
                network.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.rows.append(len([*args, *kwargs.values()][0]))

    def on_step_begin(self, *args, **kwargs):
        self.rows.clear()  # those of the check at the start


def test_guidance_nowhere_and_everywhere(family, tmp_path):
    counts = {}
    for cfg_mode in ("none", "full"):
        trainer = make_trainer(family, tmp_path, cfg_mode=cfg_mode, max_steps=1, logging_steps=1)
        if not trainer.replay.arguments.guides:
            pytest.skip("takes no guidance")
        counter = CountRows(trainer)
        trainer.add_callback(counter)
        trainer.train()
        counts[cfg_mode] = counter.rows
        assert "kl" in trainer.state.log_history[0]
    assert set(counts["none"]) == {len(SEEDS)}
    assert sum(counts["full"]) > 1.3 * sum(counts["none"])  # twice at the steps that are guided, half of them in Lumina 2


@pytest.fixture(scope="module")
def page():
    source = Path(__file__).parents[1] / "docs" / "pipelines_table.py"
    spec = importlib.util.spec_from_file_location("pipelines_table", source)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


@pytest.mark.slow
def test_the_table_in_the_docs_is_that_of_the_families(page):
    assert page.BEGIN + page.table() + page.END in page.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_pipeline_class_of_diffusers_is_in_the_docs_with_the_way_it_is_trained(page):
    ways = {cls.__name__: page.how_it_is_trained(cls) for cls in page.exported()}
    assert ways["StableDiffusion3Pipeline"] == ways["WanPipeline"] == ways["StableDiffusionPipeline"] == page.PIPELINE
    assert ways["HunyuanImagePipeline"] == ways["Cosmos2TextToImagePipeline"] == ways["KandinskyV22Pipeline"] == page.NETWORK
    # Kandinsky 3 has the pipeline's method, and a network that takes no adapter.
    assert ways["DiTPipeline"] == ways["Kandinsky3Pipeline"] == ways["LattePipeline"] == page.ALL
    assert "scheduler" in ways["LatentConsistencyModelPipeline"] and "no transformer" in ways["ShapEPipeline"]
    assert len(ways) == len(set(ways)) > 250
    assert page.BEGIN_CLASSES + page.classes() + page.END_CLASSES in page.PAGE.read_text(encoding="utf-8")
    for family in FAMILIES:
        pipeline = family.build()
        if isinstance(pipeline, ModularPipeline):  # a class for each workflow's blocks, which the table does not list
            continue
        name = type(pipeline).__name__
        lora = page.NETWORK if family.network_lora else page.PIPELINE
        assert ways[name] == (page.ALL if family.lora is None else lora), name
