"""The rivals compute what they claim, and their logs parse.

`averaging` trains isolated MACHs and averages their parameters. `plain` is the
script that most people would write.
"""

import pytest
import torch

import conftest
from mach import metrics

AVERAGING = conftest.load_main('tests/averaging')


def make(dataset, **names):
    """Settings of the rival, and two members."""
    names = dict(k=2, steps=4, batch_size=16, precision='fp32') | names
    settings = AVERAGING.Hyperparameters(**names)
    return settings, AVERAGING.make_members(settings, dataset)


def test_members_start_alike_without_edges(dataset):
    _, members = make(dataset)
    first, second = map(conftest.weights, (one.network for one in members))
    assert torch.equal(first, second)
    assert not any(one.exchange.children for one in members)
    connected = AVERAGING.Graph(k=2, batch_size=16, precision='fp32')
    first, _ = AVERAGING.make_members(connected, dataset)
    assert not first.exchange.children  # benchmark_averaging.py asks so


@pytest.mark.parametrize('sized', [False, True])
def test_all_get_the_mean(dataset, sized):
    _, members = make(dataset, shards='skewed')
    for one in members:
        one.step()
    sizes = [one.batches.classes.sum() if sized else 1 for one in members]
    first, second = map(conftest.weights, (one.network for one in members))
    mean = (sizes[0] * first + sizes[1] * second) / sum(sizes)
    AVERAGING.average(members, make(dataset)[1][0].network, sized=sized)
    for one in members:
        torch.testing.assert_close(conftest.weights(one.network), mean)


def test_an_outer_step_of_rate_one_without_momentum_is_the_mean(dataset):
    plain, _ = AVERAGING.train(make(dataset, every=2)[0], dataset)
    settings, _ = make(dataset, every=2, outer_rate=1.0, outer_momentum=0.0)
    outer, _ = AVERAGING.train(settings, dataset)
    torch.testing.assert_close(conftest.weights(plain), conftest.weights(outer))


def test_a_dead_member_is_left_out(dataset):
    _, members = AVERAGING.train(make(dataset)[0], dataset, dies=0)
    assert [one.index for one in members] == [1]


@pytest.mark.skipif(not conftest.DATA, reason='plain reads MNIST itself')
@pytest.mark.parametrize('rival, few', [('tests/averaging', ['--k=2']),
                                        ('tests/plain', [])])
def test_a_rival_learns_and_logs(rival, few, tmp_path):
    words = '--steps=60', '--evaluate_every=30', '--precision=fp32', '--seed=2'
    with conftest.running(tmp_path / 'it', rival, *words, *few) as process:
        code, out, err = process.end()
    log = metrics.parse_log(out)
    assert code == 0 and 'Traceback' not in err and not log.skipped
    assert log.run['experiment'] == rival.split('/')[1]
    assert [found['step'] for found in log.evals] == [30, 60]
    assert 70 < log.mean['real'] < 100 and log.mean['steps'] == 60
    assert log.run['seed'] == log.hparams['seed'] == 2
