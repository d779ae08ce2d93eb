"""The objectives against closed forms and against the arrays of the schedulers that they hand out."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from iwin_dit.diffusion import DDPM, FlowMatching

X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
U = torch.tensor([0.001, 0.2, 0.4, 0.6, 0.8, 0.999], dtype=torch.float64)
Y = torch.zeros(6, dtype=torch.long)


class Recorder:
    """A denoiser that keeps what it is given and answers with a function of it."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, hidden_states, timestep, class_labels, *, return_dict):
        self.x, self.t = hidden_states, timestep
        return (self.answer(hidden_states, timestep),)


# --- flow matching


def test_the_true_velocity_has_no_loss_and_leads_back_to_the_data():
    objective = FlowMatching(time_distribution="uniform")
    model = Recorder(lambda x, t: NOISE - X)
    assert objective.loss(model, X, Y, NOISE, U).max() < 1e-28
    torch.testing.assert_close(model.t, 1000 * U)
    t = (model.t / 1000)[:, None, None, None]
    torch.testing.assert_close(model.x - t * (NOISE - X), X)


def test_training_and_sampling_speak_of_the_same_noise_level():
    """x_t at a scheduler's timestep is what the scheduler itself makes of data and noise."""
    objective = FlowMatching(time_distribution="uniform", shift=2.0)
    scheduler = objective.scheduler()
    model = Recorder(lambda x, t: x)
    for timestep in scheduler.timesteps[[0, 300, 998]]:
        objective.loss(model, X, Y, NOISE, torch.full((6,), timestep.item() / 1000, dtype=torch.float64))
        expected = scheduler.scale_noise(X.float(), timestep[None], NOISE.float())
        torch.testing.assert_close(model.x.float(), expected, atol=1e-4, rtol=1e-4)


def test_a_scheduler_step_with_the_true_velocity_reaches_the_data():
    scheduler = FlowMatching().scheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    x = NOISE.float()
    for t in scheduler.timesteps:
        x = scheduler.step((NOISE - X).float(), t, x).prev_sample
    torch.testing.assert_close(x, X.float())


def test_velocity_loss_by_hand():
    objective = FlowMatching(time_distribution="uniform", cosine_weight=0.5)
    loss = objective.loss(Recorder(lambda x, t: 2 * x), X, Y, NOISE, U)
    for i, t in enumerate(U):
        prediction, velocity = 2 * ((1 - t) * X[i] + t * NOISE[i]), NOISE[i] - X[i]
        cosine = (prediction * velocity).sum(0) / (prediction.norm(dim=0) * velocity.norm(dim=0))
        expected = (prediction - velocity).square().mean() + 0.5 * (1 - cosine).mean()
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-6)


def test_logit_normal_times():
    objective = FlowMatching(logit_mean=0.5, logit_std=2.0)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = torch.logit(objective.time(u))
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(2.0, rel=1e-2)
    assert objective.time(torch.tensor([1e-7, 1 - 1e-7])).isfinite().all()


@pytest.mark.parametrize("arguments", [{"time_distribution": "beta"}, {"logit_std": 0.0}, {"shift": -1.0}])
def test_flow_mistakes(arguments):
    with pytest.raises(ValueError, match="got"):
        FlowMatching(**arguments)


# --- DDPM


def test_noisy_data_is_the_schedulers():
    objective, model = DDPM(), Recorder(lambda x, t: x)
    objective.loss(model, X, Y, NOISE, U)
    assert model.t.tolist() == [1, 200, 400, 600, 800, 999]
    expected = objective.scheduler().add_noise(X.float(), NOISE.float(), model.t.long())
    torch.testing.assert_close(model.x.float(), expected)


def test_the_true_noise_has_no_loss():
    assert DDPM().loss(Recorder(lambda x, t: NOISE), X, Y, NOISE, U).max() < 1e-28


def test_betas_are_the_schedulers():
    objective = DDPM(beta_start=1e-3, beta_end=0.01)
    torch.testing.assert_close(objective._betas.float(), objective.scheduler().betas)
    assert objective.scheduler().config.clip_sample is False


def test_learned_variance_is_zero_where_prediction_is_the_posterior():
    """With the true noise and v = -1, the lower bound, the step is the true posterior: KL 0 for every t > 0."""
    answer = torch.cat([NOISE, -torch.ones_like(NOISE)], dim=1)
    loss = DDPM(learned_variance=True).loss(Recorder(lambda x, t: answer), X, Y, NOISE, U)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-6, rtol=0)


def test_learned_variance_term_against_torch_distributions():
    objective = DDPM(learned_variance=True)
    v = torch.linspace(-1, 1, X.numel()).view_as(X).double()
    guess = NOISE + 0.1
    t = torch.tensor([1, 10, 300, 500, 800, 999])
    x_t = objective.scheduler().add_noise(X, NOISE, t)
    term = objective.variational_term(X, x_t, guess, v, t)
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=False)
    abar, betas = scheduler.alphas_cumprod.double(), scheduler.betas.double()
    for i, step in enumerate(t.tolist()):
        previous = abar[step - 1]
        variance = betas[step] * (1 - previous) / (1 - abar[step])
        weights = (
            previous.sqrt() * betas[step] / (1 - abar[step]),
            (1 - betas[step]).sqrt() * (1 - previous) / (1 - abar[step]),
        )
        x_0 = (x_t[i] - (1 - abar[step]).sqrt() * guess[i]) / abar[step].sqrt()
        truth = torch.distributions.Normal(weights[0] * X[i] + weights[1] * x_t[i], variance.sqrt())
        scale = scheduler._get_variance(step, predicted_variance=v[i]).double().exp().sqrt()
        model = torch.distributions.Normal(weights[0] * x_0 + weights[1] * x_t[i], scale)
        expected = torch.distributions.kl_divergence(truth, model).mean() / math.log(2)
        assert term[i].item() == pytest.approx(expected.item(), rel=1e-2)  # the scheduler's arrays are float32


def test_the_first_step_is_a_density():
    objective, v = DDPM(learned_variance=True), torch.zeros_like(X)
    t = torch.zeros(6, dtype=torch.long)
    x_t = objective.scheduler().add_noise(X, NOISE, t)
    term = objective.variational_term(X, x_t, NOISE + 0.2, v, t)
    log_variance = 0.5 * (objective._betas[0].log() + objective._posterior_log_variance[0])
    abar = objective._alphas_cumprod[0]
    mean = (x_t - (1 - abar).sqrt() * (NOISE + 0.2)) / abar.sqrt()
    density = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(X).flatten(1).mean(1)
    torch.testing.assert_close(term, -density / math.log(2), rtol=1e-3, atol=1e-3)


def test_the_bound_trains_the_variance_alone():
    output = torch.randn(6, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    objective = DDPM(learned_variance=True)
    with_bound = objective.loss(Recorder(lambda x, t: output), X, Y, NOISE, U).sum()
    (gradient,) = torch.autograd.grad(with_bound, output)
    simple = DDPM().loss(Recorder(lambda x, t: output[:, :4]), X, Y, NOISE, U).sum()
    (simple_gradient,) = torch.autograd.grad(simple, output)
    torch.testing.assert_close(gradient[:, :4], simple_gradient[:, :4])
    assert gradient[:, 4:].any()


@pytest.mark.parametrize("arguments", [{"beta_start": 0.0}, {"beta_start": 0.1, "beta_end": 0.01}])
def test_ddpm_mistakes(arguments):
    with pytest.raises(ValueError, match="expected 0 < beta_start"):
        DDPM(**arguments)
