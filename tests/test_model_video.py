"""The 3-D model: dense-mask oracle, what is causal, equality with the 2-D model it is inflated from, the contract."""

import copy

import diffusers
import pytest
import torch
from diffusers import AutoModel
from hypothesis import given, settings
from hypothesis import strategies as st

from iwin_dit import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel, inflate, preset
from iwin_dit.models.inflate import load_inflated
from tests.test_attention import dense_iwin_attention
from tests.tools import relative_error, tiny_model, tiny_video_model

X = torch.randn(2, 4, 4, 6, 6, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([100.0, 900.0]), torch.tensor([3, 10])  # 10 is the null class
LATTE = [[1, -1, -1], [-1, 1, 1]]


def run(model, x=X, **arguments):
    with torch.no_grad():
        return model(x, T.to(x.dtype), Y, **arguments).sample


# --- the function


class DenseAttention(torch.nn.Module):
    """The specification in place of the layer: all tokens, and the mask of Lemma 1."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return dense_iwin_attention(self.attn, x)


def check_against_dense_attention(size, **options):
    model = tiny_video_model(**options).double()
    dense = copy.deepcopy(model)
    for block in dense.blocks:
        block.attn = DenseAttention(block.attn)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 4, *size, dtype=torch.float64)
    results = []
    for m in (model, dense):
        y = m(x, T.double(), Y).sample
        results.append([y, *torch.autograd.grad(y, [x, *m.parameters()], cotangent)])
    for ours, expected in zip(*results, strict=True):
        scale = expected.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours / scale, expected / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window_padding", ["masked", "attended"])
@pytest.mark.parametrize("size", [(4, 6, 6), (5, 7, 3), (1, 4, 5)])
def test_dense_attention_under_the_mask_is_the_same(size, window_padding):
    check_against_dense_attention(size, window_size=(2, 3, 4), window_padding=window_padding)


@pytest.mark.parametrize("size", [(4, 6, 6), (3, 5, 4)])
def test_factorised_attention_is_a_schedule(size):
    """Latte's alternating blocks: all tokens of a frame, then all frames of a place."""
    check_against_dense_attention(size, window_size=LATTE)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.tuples(*[st.integers(1, 5)] * 3),
    windows=st.lists(st.tuples(*[st.sampled_from([-1, 1, 2, 3])] * 3), min_size=1, max_size=2),
    window_padding=st.sampled_from(["masked", "attended"]),
)
def test_dense_attention_for_random_shapes_and_schedules(size, windows, window_padding):
    check_against_dense_attention(size, window_size=windows, window_padding=window_padding)


def test_blocks_of_factorised_attention_mix_space_or_time():
    """The mask above is what the words say: a spatial block keeps frames apart, a temporal one places."""
    attention = [block.attn for block in tiny_video_model(window_size=LATTE).blocks]
    x = torch.randn(1, 4, 6, 6, 16)
    changed = x.clone()
    changed[:, 1, 2, 3] += 1
    spatial, temporal = ((attn(x) != attn(changed)).any(-1)[0].nonzero().unique(dim=0).tolist() for attn in attention)
    assert spatial == [[1, h, w] for h in range(6) for w in range(6)]
    assert temporal == [[t, 2, 3] for t in range(4)]


@pytest.mark.parametrize("size", [(4, 6, 6), (1, 6, 6), (5, 7, 4), (7, 1, 2), (2, 12, 6)])
def test_any_size(size):
    x = torch.randn(2, 4, *size)
    y = run(tiny_video_model(), x)
    assert y.shape == x.shape
    assert y.is_contiguous()


def test_patches_and_channels():
    model = tiny_video_model(sample_size=(4, 8, 16), patch_size=(2, 2, 4), in_channels=3, out_channels=6)
    assert (model.rank, model.latent_size, model.base_grid) == (3, (4, 8, 16), (2, 4, 4))
    assert run(model, torch.randn(2, 3, 4, 8, 16)).shape == (2, 6, 4, 8, 16)


def test_presets_serve_videos_too():
    """A video model has one temporal tap more than the image model, and nothing else."""
    with torch.device("meta"):
        image = IwinDiTTransformer2DModel(**preset("S/2"))
        video = IwinDiTTransformer3DModel(**preset("S/2", patch_size=(1, 2, 2)))
    assert video.num_parameters() - image.num_parameters() == 12 * 384 * 9
    assert video.config.window_size == (8, 8, 8)


@pytest.mark.parametrize("causal", [True, False])
def test_auto_plans_every_axis(causal):
    """A causal kernel of 3 spans three groups (K >= G), a centred one links two at the border too (K >= 2G - 1)."""
    model = tiny_video_model(sample_size=(12, 16, 32), conv_kernel_size=3, causal_conv=causal)
    assert model.config.window_size == (4 if causal else 6, 8, 16)
    (report,) = model.global_exchange()
    assert (report.interior, report.borders) == (True, not causal)


def test_a_schedule_reports_every_window_once():
    model = tiny_video_model(num_layers=4, window_size=LATTE)
    assert model.window_sizes == ((1, -1, -1), (-1, 1, 1)) * 2
    assert [report.window for report in model.global_exchange()] == [(1, 6, 6), (4, 1, 1)]
    assert model.global_exchange()[0].groups == (4, 1, 1)


def test_attended_padding_is_reported_as_it_is():
    model = tiny_video_model(sample_size=(5, 9, 7), window_size=(2, 4, 4), window_padding="attended")
    assert [report.window for report in model.global_exchange()] == [(2, 4, 4)]


# --- what is causal


def first_changed_frame(model, frame=2):
    """The first frame of the output that differs after a change in one frame of the input."""
    changed = X.clone()
    changed[:, :, frame] += 1
    return int((run(model) != run(model, changed)).any(dim=1).flatten(2).any(dim=2)[0].nonzero()[0])


@pytest.mark.parametrize("structure", ["parallel", "independent", "serial"])
def test_the_convolution_never_looks_ahead(structure):
    """With one frame per window, only the convolution crosses frames."""
    model = tiny_video_model(window_size=(1, -1, -1), conv_kernel_size=3, block_structure=structure)
    assert first_changed_frame(model) == 2


def test_a_centred_convolution_does():
    model = tiny_video_model(window_size=(1, -1, -1), conv_kernel_size=3, causal_conv=False)
    assert first_changed_frame(model) == 0  # one frame ahead in each of two blocks


@pytest.mark.parametrize("window", [-1, (2, 3, 3), LATTE])
def test_attention_inside_a_window_is_not_causal(window):
    assert first_changed_frame(tiny_video_model(window_size=window)) == 0


# --- from images


IMAGE_MODELS = [
    {},
    {"block_structure": "serial", "gate": "one_plus", "norm_type": "layer_norm", "activation_fn": "gelu-approximate"},
    {"block_structure": "independent", "qk_norm": False, "qkv_bias": False, "conv_kernel_size": 5},
    {"window_size": [(4, -1), (2, 8)], "timestep_scale": 1e-3, "out_channels": 8},
    {"patch_size": (2, 4), "in_channels": 3, "out_channels": 6},
]
TIME = [{}, {"causal_conv": False, "temporal_kernel_size": 3}, {"temporal_kernel_size": 4, "temporal_window_size": 2}]


@pytest.mark.parametrize("time", TIME)
@pytest.mark.parametrize("options", IMAGE_MODELS)
def test_one_frame_is_the_image(options, time):
    image = tiny_model(**options)
    video = inflate(image, (4, 8, 8), **time)
    x = torch.randn(2, image.config.in_channels, 8, 8)
    assert relative_error(run(video, x[:, :, None])[:, :, 0], run(image, x)) < 1e-5


def test_frames_alone_are_images():
    """Without attention across frames, every frame of a clip is an image: the other taps are zero."""
    image = tiny_model()
    video = inflate(image, (4, 8, 8), temporal_window_size=1, temporal_kernel_size=3)
    clip = torch.randn(2, 4, 3, 8, 8)
    expected = torch.stack([run(image, frame) for frame in clip.unbind(2)], dim=2)
    assert relative_error(run(video, clip), expected) < 1e-5


@pytest.mark.parametrize("options", IMAGE_MODELS)
def test_identical_frames_in_one_patch_are_the_image(options):
    """Patch length pt in time: on pt identical frames, and with "repeat" on one frame; "refuse" says what to do."""
    image = tiny_model(**options)
    video = inflate(image, (9, 8, 8), temporal_patch_size=3, single_frame="repeat")
    x = torch.randn(2, image.config.in_channels, 8, 8)
    expected = run(image, x)[:, :, None]
    assert relative_error(run(video, torch.stack([x] * 3, dim=2)), expected.expand(-1, -1, 3, -1, -1)) < 1e-5
    one = run(video, x[:, :, None])
    assert one.shape == expected.shape
    assert relative_error(one, expected) < 1e-5
    refusing = inflate(image, (9, 8, 8), temporal_patch_size=3)
    with pytest.raises(ValueError, match=r"has 1 latent frame, but patch_size \(3, .*\) needs a multiple of 3"):
        run(refusing, x[:, :, None])


def test_inflated_configuration():
    image = tiny_model(window_size=[(4, -1), (2, 8)], num_layers=4).bfloat16().train()
    video = inflate(image, (16, 4, 8), temporal_patch_size=2)
    assert (video.latent_size, video.base_grid, video.kernel_size) == ((16, 4, 8), (8, 4, 8), (2, 3, 3))
    assert video.config.window_size == [(4, 4, -1), (4, 2, 8)]  # the schedule, not its repetition
    assert (video.dtype, video.training) == (torch.bfloat16, True)
    assert inflate(tiny_model(), (4, 8, 8)).config.window_size == (2, 4, 4)
    assert inflate(tiny_model(), 8).latent_size == (8, 8, 8)
    assert inflate(tiny_model(), (4, 8, 8), temporal_window_size=-1).window_sizes == ((-1, 4, 4),) * 2


def test_weights_of_an_image_model_go_into_a_schedule():
    """The windows of the video model may be others: here spatial blocks of whole frames, as in the image model."""
    image, video = tiny_model(window_size=-1), tiny_video_model(sample_size=(4, 8, 8), window_size=[[1, -1, -1]] * 2)
    load_inflated(video, image)
    x = torch.randn(2, 4, 8, 8)
    assert relative_error(run(video, x[:, :, None])[:, :, 0], run(image, x)) < 1e-5


def test_other_classes():
    """A fresh label table keeps the null class alone, whose predictions are the image model's."""
    image = tiny_model()
    for video in (tiny_video_model(num_classes=5), tiny_video_model()):  # also where there are as many of them
        table = video.class_embed.weight.clone()
        load_inflated(video, image, fresh_classes=True)
        assert torch.equal(video.class_embed.weight[:-1], table[:-1])
        assert torch.equal(video.class_embed.weight[-1], image.class_embed.weight[-1])
        assert torch.equal(video.blocks[1].attn.to_q.weight, image.blocks[1].attn.to_q.weight)
    with pytest.raises(ValueError, match="in the image model\n  of other classes, fresh_classes=True takes the null"):
        load_inflated(tiny_video_model(num_classes=5), image)
    video, x = inflate(image, (4, 8, 8), num_classes=5), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        y = video(x[:, :, None], T, torch.tensor([5, 5])).sample[:, :, 0]
        assert relative_error(y, image(x, T, torch.tensor([10, 10])).sample) < 1e-5


def test_inflation_warns_of_no_cast_that_is_none(caplog):
    diffusers.utils.logging.enable_propagation()
    try:
        inflate(tiny_model(), 8)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert not caplog.records


def test_adapters_and_fused_projections_are_named():
    peft = pytest.importorskip("peft")
    image = tiny_model()
    plain = copy.deepcopy(image)
    image.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"the image model has adapters: fuse_lora\(\) and then unload_lora"):
        inflate(image, (4, 8, 8))
    image.fuse_lora()
    image.unload_lora()
    merged = inflate(image, (4, 8, 8)).blocks[0].attn.to_q.weight
    assert not torch.equal(merged, plain.blocks[0].attn.to_q.weight)
    plain.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"image model has fused projections: call its unfuse_qkv_projections\(\)"):
        inflate(plain, (4, 8, 8))
    plain.unfuse_qkv_projections()
    inflate(plain, (4, 8, 8))


def test_every_mismatch_is_listed():
    image = tiny_model(gate="one_plus", num_classes=5, patch_size=(2, 4), pos_embed_type="sincos")
    video = tiny_video_model(patch_size=(1, 2, 2), conv_kernel_size=(2, 5, 5))
    before = copy.deepcopy(video.state_dict())
    with pytest.raises(ValueError) as error:
        load_inflated(video, image)
    for part in (
        "gate: zero in the video model, one_plus in the image model",
        "num_classes: 10 in the video model, 5 in the image model",
        "patch_size in space: (2, 2) in the video model, (2, 4) in the image model",
        "conv_kernel_size in space: (5, 5) in the video model, (3, 3) in the image model",
        "pos_embed_type of the image model: expected 'none'",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in video.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temporal_patch_size": 3}, r"patch_size \(3, 1, 1\) must divide sample_size \(4, 8, 8\)"),
        ({"temporal_patch_size": 0}, r"patch_size \(0, 1, 1\) must divide"),
        ({"temporal_kernel_size": 0}, "kernel lengths must be positive"),
        ({"temporal_window_size": 0}, "window lengths must be positive, or -1"),
        ({"causal_conv": False}, r"odd on every axis, .*, got \(2, 3, 3\)"),
        ({"single_frame": "drop"}, "single_frame must be 'refuse' or 'repeat', got 'drop'"),
    ],
)
def test_mistaken_inflation(arguments, message):
    with pytest.raises(ValueError, match=message):
        inflate(tiny_model(), (4, 8, 8), **arguments)


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_size": (8, 8)}, r"sample_size must be an int or have one entry per grid axis \(3\), got \(8, 8\)"),
        ({"patch_size": (3, 1, 1)}, r"patch_size \(3, 1, 1\) must divide sample_size \(4, 6, 6\)"),
        ({"patch_size": (1, 4, 1)}, r"patch_size \(1, 4, 1\) must divide sample_size \(4, 6, 6\)"),
        ({"window_size": (4, 4)}, r"window_size must be an int or have one entry per grid axis \(3\), got \(4, 4\)"),
        ({"window_size": [(1, -1, -1), (4, 4)]}, r"one entry per grid axis \(3\), got \(4, 4\)"),
        ({"window_size": LATTE, "num_layers": 3}, "must repeat to num_layers=3 blocks, got 2 windows"),
        ({"window_size": (2, 0, 2)}, r"window lengths must be positive, or -1 for the whole axis, got \(2, 0, 2\)"),
        ({"conv_kernel_size": (2, 2, 3)}, r"odd in space, got \(2, 2, 3\)"),
        ({"conv_kernel_size": (3, 3)}, "conv_kernel_size must be an int or have one entry per grid axis"),
        ({"causal_conv": False}, r"odd on every axis, as the convolution is centred in time too, got \(2, 3, 3\)"),
        ({"window_padding": "zeros"}, "window padding must be 'masked' or 'attended', got 'zeros'"),
        ({"single_frame": "drop"}, "single_frame must be 'refuse' or 'repeat', got 'drop'"),
        ({"pos_embed_type": "sincos"}, "to be a multiple of 6, got 16"),
    ],
)
def test_mistakes_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_video_model(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 6, 6), r"hidden_states must be \(B, 4, T, H, W\), got \(2, 3, 4, 6, 6\)"),
        ((2, 4, 6, 6), r"hidden_states must be \(B, 4, T, H, W\), got \(2, 4, 6, 6\)"),
        ((2, 4, 3, 6, 6), r"patch_size \(2, 1, 1\) must divide the latent size, got \(3, 6, 6\)"),
        ((2, 3, 1, 6, 6), r"hidden_states must be \(B, 4, T, H, W\), got"),
        ((2, 4, 1), r"hidden_states must be \(B, 4, T, H, W\), got"),
    ],
)
def test_mistaken_input(shape, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_video_model(patch_size=(2, 1, 1), single_frame="repeat"), torch.randn(shape))


# --- the diffusers contract


@pytest.mark.parametrize("window_size", ["auto", LATTE])
def test_save_and_load(tmp_path, window_size):
    model = tiny_video_model(window_size=window_size, single_frame="repeat", window_padding="attended")
    model.save_pretrained(tmp_path)
    for loaded in (IwinDiTTransformer3DModel.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert type(loaded) is IwinDiTTransformer3DModel
        assert loaded.window_sizes == model.window_sizes
        assert (loaded.config.single_frame, loaded.config.window_padding) == ("repeat", "attended")
        assert torch.equal(run(loaded), run(model))


def test_an_image_model_is_refused_with_every_difference(tmp_path):
    tiny_model(window_size=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit IwinDiTTransformer3DModel") as error:
        IwinDiTTransformer3DModel.from_pretrained(tmp_path)
    assert "shape of blocks.1.conv.weight" in str(error.value)


def test_gradient_checkpointing_changes_no_bit():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_video_model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(X, T, Y).sample.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "window"), [((4, 6, 6), "auto"), ((3, 7, 5), (2, 3, 3)), ((4, 6, 6), LATTE)])
def test_repeated_blocks_compile_without_graph_breaks(size, window):
    model, x = tiny_video_model(window_size=window), torch.randn(2, 4, *size)
    expected = run(model, x)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [4, 1])
def test_the_whole_model_compiles_without_graph_breaks(frames):
    model = tiny_video_model(patch_size=(2, 1, 1), single_frame="repeat")
    x = X[:, :, :frames]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, T, Y, return_dict=False)[0], run(model, x))


@pytest.mark.parametrize("frames", [4, 1])
def test_lora_scale_reaches_the_layers(frames):
    peft = pytest.importorskip("peft")
    model = tiny_video_model(patch_size=(2, 1, 1), single_frame="repeat")
    x = X[:, :, :frames]
    expected = run(model, x)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(run(model, x), expected)
    torch.testing.assert_close(run(model, x, attention_kwargs={"scale": 0.0}), expected)
