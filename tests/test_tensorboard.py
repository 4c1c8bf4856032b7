"""--tensorboard FOLDER: the curves equal the log, and no curve harms a run."""

import os
import sys
import time
from unittest import mock

import conftest
import pytest

from mach import metrics

pytest.importorskip('tensorboard')
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import plugin_data_pb2

every_experiment = pytest.mark.parametrize(
    'experiment', conftest.SYNCHRONOUS + conftest.ASYNCHRONOUS)


def read(folder):
    """Tag -> [(step, value)] of a MACH; the mean also has `hparams`."""
    reader = event_accumulator.EventAccumulator(str(folder))
    found = {
        tag: [(point.step, point.value) for point in reader.Scalars(tag)]
        for tag in reader.Reload().Tags()['scalars']
    }
    if 'hparam/real' in found:
        content = reader.PluginTagToContent('hparams')
        start = plugin_data_pb2.HParamsPluginData.FromString(
            content['_hparams_/session_start_info']).session_start_info
        found['hparams'] = {
            name: value.string_value or value.number_value or '-'
            for name, value in start.hparams.items()
        }
    return found


def check(log, folder):
    """Every number of the log, and nothing else, is in the event files."""
    wanted, no_curve = {}, {'experiment', 'dataset', 'seed', 'mach', 'step'}
    for kind in 'step', 'eval', 'final':
        for fields in getattr(log, f'{kind}s'):
            curves = wanted.setdefault(f'mach {fields["mach"]}', {})
            step = fields.get('step', fields.get('steps'))
            for key in fields.keys() - no_curve:
                point = step, pytest.approx(fields[key], nan_ok=True)
                curves.setdefault(f'{kind}/{key}', []).append(point)
    mean = wanted['mach mean']
    mean |= {f'hparam/{k}': mean[f'final/{k}'] for k in ('real', 'synthetic')}
    mean['hparams'] = {key: value or '-' for key, value in log.hparams.items()}
    assert {one: read(folder / one) for one in os.listdir(folder)} == wanted


@every_experiment
def test_each_run_has_curves_of_its_own(run_here, before, tmp_path, experiment):
    given, names = ['--evaluate_every=2'], []
    dry = run_here(experiment, f'--tensorboard={tmp_path}', '--dry_run=True')
    assert dry[0] == 0 and not os.listdir(tmp_path)

    def run(folder, *words):
        to = tmp_path / folder
        found = run_here(experiment, f'--tensorboard={to}', *given, *words)
        name, = os.listdir(to)
        check(found[1], to / name)
        names.append(name)
        return found

    code, log, err = run('a')
    assert (code, err) == (0, '') and log.evals
    time.sleep(1)  # names have the second and the process
    assert run('b', '--steps=8')[0] == 0
    before(experiment, 'step', lambda *_: 1 / 0)  # every MACH fails
    code, _, err = run('c')
    assert code == 1 and 'no more curves' not in err  # they are nan
    assert names[0] != names[1]
    assert all(name.startswith(f'{experiment}.seed0.') for name in names)


@every_experiment
def test_what_fails(run_here, monkeypatch, tmp_path, experiment):
    given, full = f'--tensorboard={tmp_path}', mock.Mock(side_effect=OSError)
    monkeypatch.setattr(metrics, 'open', full, raising=False)
    code, log, err = run_here(experiment, given)
    assert code == 0 and log.mean['steps'] == 6  # the run goes on
    assert err.startswith('warning: no more curves') and err.count('\n') == 1
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    for words in [], ['--dry_run=True']:
        code, out, err = run_here(experiment, given, *words)
        assert (code, out) == (2, '') and err.count('\n') == 1
        assert err.startswith(f'{experiment}: --tensorboard needs: pip install')
    assert run_here(experiment)[0] == 0
