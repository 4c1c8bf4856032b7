"""What each figure and table of the READMEs consists of, and its runs."""

import itertools

from mach import metrics

EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
RIVALS = 'asynchronous_kgraph', 'tests/averaging'
TIMED = 'synchronous_single', 'asynchronous_kgraph', 'tests/plain'
THREE = dict(seed=(0, 1, 2))
FIVE = dict(seed=(0, 1, 2, 3, 4), connected=(True, False))
SKEWED = FIVE | dict(shards=('skewed',))
# One MACH with all the data, and as many steps as five together.
CENTRAL = dict(k=(1,), steps=(15000,), dropout=(0.4,))
# A MACH that waits takes seconds for a step.
SLOW = dict(deadline=(10,), steps=(50,), evaluate_every=(0,))
DELAYS = dict(inputs=('synthetic', 'real'), latency=(0, 0.01, 0.1, 1))
# Figure -> its experiments or folders, and hyperparameter -> its values. Each
# combination is a run. An experiment ignores hyperparameters that it lacks.
FIGURES = dict(
    experiments=(EXPERIMENTS, THREE),
    isolated=(EXPERIMENTS[3:], THREE | dict(connected=(False,))),
    central=(EXPERIMENTS[4:], THREE | CENTRAL),
    k=(RIVALS, FIVE | dict(k=(5, 10, 20, 40), neighbours=(4,))),
    skew=(RIVALS, SKEWED | dict(skew=(0.1, 0.5, 5))),
    skew_k20=(RIVALS, SKEWED | dict(k=(20,), neighbours=(4,))),
    latency=(EXPERIMENTS[3:], THREE | DELAYS | SLOW),
    seconds=(TIMED, THREE | dict(steps=(1500,), evaluate_every=(100,))),
)


def list_runs(options, chosen, given):
    """Yields (path of main.py, name, hyperparameters) of every run, in order.

    The name has what differs within a figure or was given for it.

    Args:
        options: of mach/main.py.
        chosen: path of main.py -> names of its hyperparameters.
        given: hyperparameter -> its value on the command line.
    """
    values, shown = {key: (value,) for key, value in given.items()}, set()
    if options.record:
        figure = FIGURES[options.record][1]
        shown = {key for key in figure if len(figure[key]) > 1}
        shown |= set(given) - set(metrics.BOOKKEEPING)
        values = figure | values
    if options.seeds:
        values['seed'] = options.seeds
        shown.add('seed')
    if options.isolated == 'True':
        values['connected'] = True, False
    for path, names in chosen.items():
        own = {key: values[key] for key in values if key in names}
        for combination in itertools.product(*own.values()):
            run, parts = dict(zip(own, combination)), [path.parent.name]
            if str(run.get('connected')) == 'False':
                parts.append('isolated')
            for key in own:
                if key in shown - {'connected', 'seed'}:
                    parts.append(f'{key}_{run[key]}')
            if 'seed' in own and 'seed' in shown:
                parts.append(f'seed{run["seed"]}')
            yield path, '.'.join(parts), run
