"""mach/plot.py: what is drawn of made-up logs."""

import math
import sys

import pytest

from mach import main, metrics, plot

line = metrics.format_line
EVALS = [(10, 90.0, 5.0), (20, 95.0, 9.0)]  # step, real, seconds


def text(seed=0, name='x', evals=(), lines=(), real=97.0, rate=1.0, **hparams):
    """The log of a finished run of an experiment."""
    rows = [line('run', experiment=name, dataset='MNIST', seed=seed)]
    rows += [line('hparams', seed=seed, steps=20, **hparams)]
    for step, now, seconds in evals:
        fields = dict(real=now, seconds=seconds)
        rows.append(line('eval', step=step, mach='mean', **fields))
    rows += [*lines, line('final', mach='mean', real=real, rate=rate, steps=20)]
    return '\n'.join(rows) + '\n'


def log(*args, **names):
    """The Log of `text`."""
    return metrics.parse_log(text(*args, **names))


def draw(logs, *panels):
    """The axes of all panels, in order."""
    return plot.make_figure(logs, panels or None).axes


def drawn(axes):
    """'label style' -> [x, y] of each line."""
    names = [f'{one.get_label()} {one.get_linestyle()}' for one in axes.lines]
    return dict(zip(names, ([*map(list, o.get_data())] for o in axes.lines)))


def test_two_seeds_are_a_mean_in_a_band():
    other = [(10, 92.0, 7.0), (20, 97.0, 11.0)]
    steps, seconds = draw([log(0, evals=EVALS), log(1, evals=other), log(2)])
    assert drawn(steps) == {'x -': [[10, 20], [91, 96]]}
    assert drawn(seconds) == {'x -': [[6, 10], [91, 96]]}
    points = steps.collections[0].get_paths()[0].vertices
    assert {y for x, y in points if x == 10} == {91 - 2**.5, 91 + 2**.5}


def test_a_repeated_step_counts_once():
    last = dict(step=20, mach='mean', synthetic=80.0, real=95.0, seconds=9.0)
    again = [line('eval', **last | dict(synthetic=70.0)), line('eval', **last)]
    steps, seconds = draw([log(evals=[(10, 1.0, 5.0), *EVALS], lines=again)])
    assert drawn(seconds) == {'x -': [[5, 9], [90, 95]], 'x --': [[9], [80]]}
    assert drawn(steps) == {'x -': [[10, 20], [90, 95]], 'x --': [[20], [80]]}


def test_the_ends_of_lines_are_shown_at_large():
    rising = [(10, 20.0, 5.0), (20, 96.0, 9.0)]
    steps, _ = draw([log(evals=rising, lr=2), log(evals=EVALS, lr=1)])
    assert steps.get_ylim()[0] == 95 - 5
    steps, _ = draw([log(evals=[(10, math.nan, 5.0)])])
    assert not steps.lines


def test_labels_are_those_of_the_table():
    first = dict(evals=EVALS, k=5, depth=1, lr=1, connected=True)
    logs = [log(**first), log(**first | dict(k=3, depth=2))]
    logs += [log(**first | dict(connected=False))]
    logs += [log(name='plain', evals=EVALS)]
    axes, _ = draw(logs)
    labels = ('x, k 5, depth 1, connected True',
              'x, k 3, depth 2, connected True', 'x, k 5, connected False')
    assert list(drawn(axes)) == [f'{one} -' for one in (*labels, 'plain')]


def test_runs_that_differ_are_never_one_line():
    """Not even if the code of a third run lacked the hyperparameter."""
    logs = [log(0, evals=EVALS, lr=0), log(1, evals=EVALS, lr=9)]
    axes, *_ = draw([*logs, log(2, evals=EVALS)])
    assert list(drawn(axes)) == ['x, lr 0 -', 'x, lr 9 -', 'x, lr - -']


def test_a_label_has_one_look_and_a_look_one_label():
    logs = [log(evals=EVALS, k=i % 2, lr=i // 2) for i in range(34)]
    lines = [one for axes in draw(logs) for one in axes.lines]
    looks = [(one.get_color(), one.get_marker()) for one in lines]
    both = {*zip((one.get_label() for one in lines), looks)}
    # Each lr is a label without k in the sweeps, and two with k elsewhere.
    assert len(both) == len(dict(both)) == len(set(looks)) == 17 + 34


@pytest.mark.parametrize('values, scale, name', [
    ([1, 2, 40], 'symlog', 'k'),
    ([0.0, 0.1, 3.0], 'symlog', 'latency'),
    ([0.0, 0.1, 0.3], 'linear', 'loss_rate'),
])
def test_a_sweep(values, scale, name):
    logs = [log(0, 'averaging', **{name: values[0]}), log(0, 'plain')]
    for seed in 0, 2:
        for i, x in enumerate(values):
            slowest = [line('final', mach=0, rate=9 - i, steps=20)]
            names = {name: x, 'real': 90 + i + seed, 'rate': 50}
            logs.append(log(seed, lines=slowest, **names))
    accuracy, rate = draw(logs)
    assert list(drawn(accuracy)) == ['averaging -', 'x -']  # plain has no x
    assert drawn(accuracy)['x -'] == [values, [91, 92, 93]]
    assert drawn(rate)['x -'] == [values, [9, 8, 7]]
    assert accuracy.get_xscale() == scale and name in rate.get_xlabel()
    assert list(accuracy.get_xticks()) == values
    with pytest.raises(ValueError, match='panel rate needs logs that'):
        draw(logs[:1], 'rate')


def test_worth_and_classes():
    rows = [line('shard', mach=i, classes=('1,2', '2')[i]) for i in (0, 1)]
    one = log(7, lines=[*rows, line('edge', mach=1, child=0, worth=-1.0)])
    left, right = draw([one], 'worth', 'classes')
    matrix = left.images[0].get_array().filled(8).tolist()
    assert matrix == [[8, 8], [-1, 8]]
    matrix = right.images[0].get_array().filled(8).tolist()
    assert matrix == [[1, 2], [2, 8]]
    assert '-1.00' in [text.get_text() for text in left.texts]
    assert 'seed 7' in left.get_title() and 'seed 7' in right.get_title()
    with pytest.raises(ValueError, match='panel worth needs one log with'):
        draw([one, one], 'worth')


@pytest.mark.parametrize('words, said', [
    ('--plot a.jpg', 'must end with .png'),
    ('--plot nowhere/a.svg', 'cannot write nowhere/a.svg'),
    ('--plot a.svg', 'pip install matplotlib'),
    ('--panels steps', '--panels needs --plot'),
    ('--plot a.svg --panels stops', "invalid choice: 'stops'"),
])
def test_a_mistake_ends_it_at_once(monkeypatch, capsys, words, said):
    monkeypatch.setattr(main, 'plan', lambda *_: pytest.fail('it ran'))
    if 'matplotlib' in said:
        monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(SystemExit) as caught:
        main.main(words.split())
    err = capsys.readouterr().err
    assert caught.value.code == 2 and said in err and err.count('\n') == 1


def test_the_command_line(capsys, tmp_path):
    (tmp_path / 'log').write_text(text(evals=EVALS))
    words = ['--compare', str(tmp_path / 'log'), '--plot']
    one, two = tmp_path / 'one.svg', tmp_path / 'two.svg'
    assert [main.main([*words, str(path)]) for path in (one, two)] == [0, 0]
    assert '>steps (solid' in one.read_text() == two.read_text()
    capsys.readouterr()
    assert main.main([*words, str(one), '--panels', 'steps', 'rate']) == 2
    said = f'mach: --plot: panel rate needs {plot.SWEEP}\n'
    assert capsys.readouterr().err == said
