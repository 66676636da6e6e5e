"""The compile settings of tools: generate, Trainer, accelerate, Lightning, diffusers."""

import copy

import pytest
import torch

import normfuse
from normfuse.explain import explain_with
from normfuse.testing import capture
from tests.float64 import assert_as_close_as_eager

transformers = pytest.importorskip("transformers")

SEEN = []  # the ops of every graph: the tools copy options, so that a list of a test would not do


def note_ops(graph):
    SEEN.append([node.target._opname for node in graph.nodes if "normfuse" in str(node.target)])


OPTIONS = {
    "normfuse.lowering": "op",
    "disable_cpp_codegen": True,
    "post_grad_custom_post_pass": note_ops,
}


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.guarantee
def test_generate_with_a_static_cache():
    model, ids = llama().eval(), torch.tensor([[3, 5, 7]])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    compile_config = transformers.CompileConfig(backend="normfuse", mode=None, options=OPTIONS)
    compile_config._compile_all_devices = True  # transformers compiles for a CPU only if it is told

    tokens = model.generate(
        ids, cache_implementation="static", compile_config=compile_config, **settings
    )

    assert torch.equal(tokens, expected)
    assert ["rms_norm", "rope", "add_rms_norm", "add_rms_norm"] in SEEN


def configure_inductor(options):
    for name, value in options.items():
        setattr(torch._inductor.config, name, value)


@pytest.mark.guarantee
@torch.no_grad()
def test_a_tool_without_settings_obeys_inductors_configuration():
    model, ids = llama().eval(), torch.tensor([[3, 5, 7]])
    ours = normfuse.options(
        lowering="op", disable_cpp_codegen=True, post_grad_custom_post_pass=note_ops
    )
    before = {name: getattr(torch._inductor.config, name) for name in ours}

    try:
        configure_inductor(ours)
        logits = torch.compile(model)(ids).logits
    finally:
        configure_inductor(before)

    assert ["rms_norm", "rope", "add_rms_norm", "add_rms_norm"] in SEEN
    exact = copy.deepcopy(model).double()(ids).logits
    assert_as_close_as_eager(logits, model(ids).logits, exact)


def trained_by_trainer(model, directory):
    """The weights after three steps of SGD."""
    examples = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(6)]
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=examples).train()
    return dict(model.named_parameters())


@pytest.mark.guarantee
def test_trainer_trains_a_model_that_compiles_itself(tmp_path):
    pytest.importorskip("accelerate")
    model = llama()
    eager = trained_by_trainer(copy.deepcopy(model), tmp_path)
    exact = trained_by_trainer(copy.deepcopy(model).double(), tmp_path)

    model.compile(backend="normfuse", options=OPTIONS)
    ours = trained_by_trainer(model, tmp_path)

    assert ["rms_norm", "rope", "add_rms_norm", "add_rms_norm"] in SEEN
    assert ours.keys() == eager.keys()
    for name, weight in ours.items():
        assert_as_close_as_eager(weight, eager[name], exact[name])


def test_accelerates_list_of_backends_is_closed(tmp_path, monkeypatch):
    """docs/engines.md says so: `torch_compile_backend="normfuse"` cannot work."""
    pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # Trainer's arguments write it
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), torch_compile_backend="normfuse", use_cpu=True
    )

    with pytest.raises(ValueError, match="'NORMFUSE' is not a valid DynamoBackend"):
        transformers.Trainer(model=llama(), args=arguments)


@pytest.mark.guarantee
def test_accelerate_prepares_a_compiled_model():
    accelerate = pytest.importorskip("accelerate")
    # Fewer tokens have gradients so near zero that eager's own error is a matter of luck.
    model, ids = llama(), torch.arange(96).view(2, 48) * 7 % 32
    expected = torch.autograd.grad(model(ids).logits.sum(), model.parameters())

    prepared = accelerate.Accelerator(cpu=True).prepare(
        torch.compile(model, backend="normfuse", options=OPTIONS)
    )

    loss = prepared(ids).logits.sum()
    assert ["rms_norm", "rope", "add_rms_norm", "add_rms_norm"] in SEEN
    gradients = torch.autograd.grad(loss, model.parameters())
    exact = copy.deepcopy(model).double()
    exact = torch.autograd.grad(exact(ids).logits.sum(), exact.parameters())
    for ours, eager, truth in zip(gradients, expected, exact, strict=True):
        assert_as_close_as_eager(ours, eager, truth)


@pytest.mark.guarantee
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loggers and workers
def test_lightning_fits_a_compiled_module(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(model, compiled):
        module = Module(model)
        trainer = lightning.Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        tokens = torch.stack([torch.arange(6)[None] + i for i in range(3)])
        batches = torch.utils.data.DataLoader(tokens, batch_size=None)
        whole = torch.compile(module, backend="normfuse", options=OPTIONS) if compiled else module
        trainer.fit(whole, batches)
        return dict(model.named_parameters())

    model = llama()
    eager, exact = fit(copy.deepcopy(model), False), fit(copy.deepcopy(model).double(), False)

    ours = fit(model, True)

    assert ["rms_norm", "rope", "add_rms_norm", "add_rms_norm"] in SEEN
    for name, weight in ours.items():
        assert_as_close_as_eager(weight, eager[name], exact[name])


@pytest.mark.guarantee
@pytest.mark.filterwarnings("ignore")  # diffusers' imports
@torch.no_grad()
def test_a_transformer_of_diffusers_is_rewritten_and_has_the_bits_of_eager():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[128, 128, 128],
        cap_feat_dim=8,
    )
    model = model.eval().bfloat16()
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4).bfloat16(),
        "timestep": torch.rand(2).bfloat16(),
        "encoder_hidden_states": torch.randn(2, 5, 8).bfloat16(),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        "return_dict": False,
    }

    report = explain_with(model, (), inputs, options={"normfuse.lowering": "op"})

    assert report.coverage == 1
    ops = {site.module: site.op for site in report.sites}
    assert ops["layers.0.norm1.norm"] == "modulated_rms_norm"
    assert ops["layers.0.attn.norm_q"] == "qk_rms_norm_rope"
    rewritten = capture(model, lowering="op")(**inputs)
    assert torch.equal(rewritten[0], model(**inputs)[0])
