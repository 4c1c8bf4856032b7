"""What each figure and table of the READMEs consists of, and its runs."""

import itertools

from mach import metrics

EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
SEEDS = 0, 1, 2, 3, 4
RIVALS = 'asynchronous_kgraph', 'tests/averaging'
# Figure -> its experiments or folders, and hyperparameter -> its values. Each
# combination is a run. An experiment ignores hyperparameters that it lacks.
FIGURES = dict(
    experiments=(EXPERIMENTS, dict(seed=SEEDS[:3])),
    isolated=(EXPERIMENTS[3:], dict(seed=SEEDS[:3], connected=(False,))),
    k=(RIVALS,
       dict(seed=SEEDS,
            connected=(True, False),
            k=(5, 10, 20, 40),
            neighbours=(4,))),
    skew=(RIVALS,
          dict(seed=SEEDS,
               connected=(True, False),
               shards=('skewed',),
               skew=(0.1, 0.5, 5))),
    skew_k20=(RIVALS,
              dict(seed=SEEDS,
                   connected=(True, False),
                   shards=('skewed',),
                   k=(20,),
                   neighbours=(4,))),
    # A MACH that waits takes seconds for a step.
    latency=(EXPERIMENTS[3:],
             dict(seed=SEEDS[:3],
                  inputs=('synthetic', 'real'),
                  latency=(0, 0.01, 0.1, 1),
                  deadline=(10,),
                  steps=(50,),
                  evaluate_every=(0,))),
    seconds=(('synchronous_single', 'asynchronous_kgraph', 'tests/plain'),
             dict(seed=SEEDS[:3], steps=(1500,), evaluate_every=(100,))),
)


def list_runs(chosen, values, shown):
    """Yields (path, name, hyperparameters) of every run, in order.

    Args:
        chosen: path of main.py -> names of its hyperparameters.
        values: hyperparameter -> its values.
        shown: hyperparameters that the name of a run has.
    """
    for path, names in chosen.items():
        own = {key: values[key] for key in values if key in names}
        for combination in itertools.product(*own.values()):
            run, parts = dict(zip(own, combination)), [path.parent.name]
            for key in own:
                if key == 'connected':
                    parts += ['isolated'] * (str(run[key]) == 'False')
                elif key in shown and key != 'seed':
                    parts.append(f'{key}_{run[key]}')
            if 'seed' in own and 'seed' in shown:
                parts.append(f'seed{run["seed"]}')
            yield path, '.'.join(parts), run


def read(options, given):
    """The values and the shown names for `list_runs`.

    Args:
        options: of mach/main.py.
        given: hyperparameter -> its value on the command line.
    """
    values = dict(FIGURES[options.record][1]) if options.record else {}
    shown = {key for key in values if len(values[key]) > 1}
    if options.record:
        shown |= set(given) - set(metrics.BOOKKEEPING)
    values |= {key: (value,) for key, value in given.items()}
    if options.seeds:
        values['seed'] = options.seeds
    if options.isolated == 'True':
        values['connected'] = True, False
    if 'seed' in values and (options.seeds or options.record):
        shown.add('seed')
    return values, shown
