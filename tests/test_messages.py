"""What is sent and what is refused: the rows that matter, nothing that is NaN."""

import math

import conftest
import pytest
import torch
from torch.nn import functional

from mach import metrics

ASYNCHRONOUS = ('asynchronous_sequence', 'asynchronous_kgraph')
FOLDERS = ('synchronous_single', 'synchronous_sequence',
           'synchronous_kgraph') + ASYNCHRONOUS


class Sink:
    """A link that keeps what is sent."""

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)


def make_parent(folder, **overrides):
    """MACH 1 with child 0 and parent 2, both Sinks."""
    modules, settings = conftest.load(folder), conftest.make_settings(
        **overrides)
    mach, student = conftest.make_networks(modules, [[0]], settings)[0]
    trainer = modules.trainer.Trainer(1, mach, student, [0],
                                      conftest.Rows(settings, 1), settings)
    sinks = Sink(), Sink()
    trainer.connect(0, sinks[0])
    trainer.connect(2, sinks[1])
    return modules, settings, trainer, sinks


@pytest.mark.parametrize('folder', ASYNCHRONOUS)
@pytest.mark.parametrize('share, rows', [(1.0, 8), (0.5, 4), (0.3, 3),
                                         (0.01, 1)])
def test_rows_with_the_largest_gradients_are_sent(folder, share, rows):
    modules, settings, trainer, (child, _) = make_parent(folder,
                                                         share=share,
                                                         batch_size=8,
                                                         dropout=0.0,
                                                         grad_weight=3.0,
                                                         learning_rate=0.0,
                                                         weight_decay=0.0)
    x, y, inquiry = trainer.open_step()
    leaf = trainer.student(x).detach().requires_grad_()  # [B, 1, E]
    loss = functional.cross_entropy(trainer.mach.head(trainer.mach(x, leaf)),
                                    y,
                                    label_smoothing=settings.label_smoothing)
    loss.backward()
    trainer.mach.zero_grad()
    trainer.close_step(x, y, inquiry)
    norms = leaf.grad.flatten(1).norm(dim=1)
    largest = set(norms.topk(rows).indices.tolist())
    spike, = (m for m in child.messages if isinstance(m, modules.link.Spike))
    grad, = (m for m in child.messages if isinstance(m, modules.link.Grad))
    assert len(grad.x) == rows and torch.equal(spike.x, grad.x)
    sent = [int((x == row).all(1).nonzero()) for row in grad.x]
    assert set(sent) == largest
    conftest.assert_close([grad.gradient], [3 * leaf.grad[sent, 0]])


@pytest.mark.parametrize('folder', ASYNCHRONOUS)
@pytest.mark.parametrize('kind', ['Spike', 'Grad x', 'Grad', 'Answer'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_is_dropped(folder, kind, value):
    modules, settings, trainer, (child, parent) = make_parent(folder)
    trainer.step()
    spike = child.messages[0]
    x = torch.randn(2, conftest.PIXELS, dtype=torch.float64)
    embedding = torch.randn(2, settings.embedding, dtype=torch.float64)
    bad_x, bad_embedding = x.clone(), embedding.clone()
    bad_x[1, 2] = bad_embedding[1, 2] = value
    trainer.mailbox.put({
        'Spike': lambda: modules.link.Spike((2, 1), 2, bad_x, 0),
        'Grad x': lambda: modules.link.Grad((2, 1), 2, bad_x, embedding, 0, 0),
        'Grad': lambda: modules.link.Grad((2, 1), 2, x, bad_embedding, 0, 0),
        'Answer': lambda: modules.link.Answer(spike.key, 0, bad_embedding, 0),
    }[kind]())
    trainer.step()
    trainer.step()
    assert trainer.staleness()[1]['dropped'] == 1
    assert not parent.messages
    for network in trainer.mach, trainer.student:
        assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_parent_does_not_see_scale_and_offset_of_an_embedding(folder):
    """So no Grad can push a child's embedding to grow or to shift."""
    torch.manual_seed(0)
    mach = conftest.load(folder).model.Mach(2, 8, 6).double()
    x = torch.randn(5, 784, dtype=torch.float64)
    inputs = torch.randn(5, 2, 6, dtype=torch.float64).requires_grad_()
    embedding = mach(x, inputs)
    changed = inputs * torch.tensor([[3.0], [0.5]]) + torch.tensor([[7.0],
                                                                    [-1.0]])
    assert torch.allclose(embedding, mach(x, changed), atol=1e-3)
    assert not torch.allclose(embedding, mach(x, inputs.flip(1)), atol=1e-3)
    gradient, = torch.autograd.grad(embedding.square().sum(), inputs)
    assert gradient.abs().max() > 1e-3
    assert gradient.sum(-1).abs().max() < 1e-9
    assert (gradient * inputs).sum(-1).abs().max() < 1e-3


def test_heads_start_alike_and_networks_do_not():
    main = conftest.load_main(conftest.ROOT / 'asynchronous_kgraph')
    settings = main.Hyperparameters(k=3, hidden=8, embedding=4)
    machs = [mach for mach, _ in main.make_networks(settings)]
    for mach in machs[1:]:
        assert torch.equal(mach.head.weight, machs[0].head.weight)
        assert mach.head.weight is not machs[0].head.weight
        assert not torch.equal(mach.local[0].weight, machs[0].local[0].weight)


def test_precision_is_the_faster_one(monkeypatch):
    assert metrics.choose_precision('bf16', 'cpu') == 'bf16'
    assert metrics.choose_precision('fp32', 'cpu') == 'fp32'
    for seconds, chosen in ((1.0, 'fp32'), (0.9, 'fp32'), (0.4, 'bf16')):
        now = [0.0]

        def linear(rows, weight, seconds=seconds, now=now):
            del weight
            now[0] += seconds if rows.dtype is torch.bfloat16 else 1.0

        monkeypatch.setattr(torch.nn.functional, 'linear', linear)
        monkeypatch.setattr(metrics.time,
                            'perf_counter',
                            lambda now=now: now[0])
        assert metrics.choose_precision('auto', 'cpu') == chosen
