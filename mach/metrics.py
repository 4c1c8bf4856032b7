"""What a MACH counts, the log every experiment prints, the table of saved logs.

A line of a log is its kind, then `key value` fields, two spaces between them:

    hparams  k 1  steps 3000  batch_size 64
    step  400  mach 2  loss 0.2131  train 97.41

Torch is not imported here, so that comparing logs does not wait for it.
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import timeit

import tqdm

KINDS = ('run', 'hparams', 'step', 'eval', 'final')
# Decimals of what was measured; a hyperparameter of the same name keeps all.
DECIMALS = dict(train=2, synthetic=2, real=2, staleness=2, loss=4)
DECIMALS |= dict(synthetic_loss=4, rate=1, seconds=1, steps=0, step=0)
# Hyperparameters that leave the result alone: runs that differ in nothing else
# are repetitions of one experiment.
BOOKKEEPING = ('seed', 'data', 'strict_data', 'log_every', 'evaluate_every',
               'dry_run', 'checkpoint', 'checkpoint_every', 'resume', 'hosts',
               'patience', 'log_folder')
# Where `say` writes: files, None for stdout.
OUTPUTS = [None]
# A MACH with a nan in one of these has failed: it must not flatter the mean.
RESULTS = ('synthetic', 'real', 'steps', 'rate')
# How the mean line comes from those of the MACHs, in the order of its keys.
COMBINE = dict.fromkeys((*RESULTS, 'staleness'), statistics.fmean)
COMBINE |= dict(staleness_max=max, dropped=sum, seconds=max, lost=sum)


class Tally:
    """What one MACH counts while it trains; copy.copy() is a snapshot.

    Attributes:
        mach: its number.
        steps: training steps taken.
        seconds: wall time from `begin` to the end of the last step.
        staleness_max: steps, of the Grad that came latest.
        dropped, lost: messages; whoever notices one adds to these.
    """

    def __init__(self, mach):
        self.mach = mach
        self.steps = self.staleness_max = self.dropped = self.lost = 0
        self.seconds = 0.0
        self._grads = self._staleness = 0
        self._open_window()
        self.begin()

    def _open_window(self):
        self._batches = self._images = self._correct = self._lessons = 0
        self._loss = self._synthetic_loss = 0.0

    def begin(self):
        """Starts the clock, where it stood at the end of the last step."""
        self._began = time.perf_counter() - self.seconds

    def step(self, loss, logits, y):
        """One training step.

        Args:
            loss: its target loss, a scalar tensor or a float.
            logits: [B, 10].
            y: labels [B].
        """
        self.steps += 1
        self._batches += 1
        self._images += len(y)
        self._correct += int((logits.argmax(1) == y).sum())
        self._loss += _number(loss)
        self.seconds = time.perf_counter() - self._began

    def lesson(self, loss):
        """One step of the student: its loss, a scalar tensor or a float."""
        self._lessons += 1
        self._synthetic_loss += _number(loss)

    def grad(self, staleness):
        """One Grad applied, so many steps late."""
        self._grads += 1
        self._staleness += staleness
        self.staleness_max = max(self.staleness_max, staleness)

    @property
    def staleness(self):
        """Steps, mean over the run; nan where no Grad has come."""
        return _ratio(self._staleness, self._grads)

    @property
    def rate(self):
        """Training steps a second, over the run."""
        return self.steps / self.seconds if self.seconds else 0.0

    def report(self):
        """Fields of a `step` line; losses and accuracy since the last call."""
        fields = dict(step=self.steps,
                      mach=self.mach,
                      loss=_ratio(self._loss, self._batches),
                      train=_ratio(100 * self._correct, self._images),
                      synthetic_loss=_ratio(self._synthetic_loss,
                                            self._lessons),
                      staleness=self.staleness,
                      rate=self.rate)
        self._open_window()
        return fields

    def totals(self):
        """Fields of a `final` line, over the run."""
        names = ('steps', 'rate', 'staleness', 'staleness_max', 'dropped',
                 'seconds', 'lost')
        return {name: getattr(self, name) for name in names}


def _number(loss):
    # float() of a tensor that has a gradient warns.
    return loss.item() if hasattr(loss, 'item') else loss


def _ratio(total, count):
    return total / count if count else math.nan


def format_line(kind, /, **fields):
    """One line of the log, without the newline.

    Floats of step, eval and final lines are rounded as `DECIMALS` says, others
    keep every digit. Of anything else the str() is written, each run of white
    space as one space and nothing as '-', so that it cannot break the line.

    Raises:
        ValueError: the kind is none of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f'no kind of line: {kind!r}')
    words = [kind]
    for key, value in fields.items():
        if isinstance(value, float) and key in DECIMALS and kind != 'hparams':
            value = f'{value:.{DECIMALS[key]}f}'
        text = ' '.join(str(value).split()) or '-'
        # The number of a step line stands without its key.
        words.append(text if kind == key == 'step' else f'{key} {text}')
    return '  '.join(words)


def parse_line(line):
    """The kind and the fields of a line; numbers and bools come back as such.

    Raises:
        ValueError: the line is not in the grammar; the message quotes it.
    """
    kind, *words = line.rstrip('\n').split('  ')
    if kind == 'step' and words:
        words[0] = f'step {words[0]}'
    matches = [re.fullmatch(r'(\w+) (\S+( \S+)*)', word) for word in words]
    if kind not in KINDS or not all(matches):
        raise ValueError(f'not a log line: {line!r:.100}')
    fields, measured = {}, DECIMALS if kind in KINDS[2:] else ()
    for key, text in (match.group(1, 2) for match in matches):
        # A commit may look like a number: 12e4567.
        fields[key] = text if key == 'commit' else _read(text)
        if isinstance(fields[key], str) and key in measured:
            raise ValueError(f'{key} is no number: {line!r:.100}')
    return kind, fields


def _read(text):
    if text in ('True', 'False'):
        return text == 'True'
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


@dataclasses.dataclass
class Log:
    """What one run wrote; an interrupted run may have no finals.

    Attributes:
        name: the file, for messages.
        run, hparams: the fields of these lines.
        steps, evals, finals: the fields of each such line, in order.
    """
    name: str
    run: dict = dataclasses.field(default_factory=dict)
    hparams: dict = dataclasses.field(default_factory=dict)
    steps: list = dataclasses.field(default_factory=list)
    evals: list = dataclasses.field(default_factory=list)
    finals: list = dataclasses.field(default_factory=list)

    @property
    def mean(self):
        """The final line of `mach mean`, or None."""
        return next((f for f in self.finals if f.get('mach') == 'mean'), None)


def parse_log(text, name='log'):
    """The one run in a text.

    Raises:
        ValueError: no log, or several; the message begins with name:line.
    """
    log = Log(name)
    for number, line in enumerate(text.split('\n'), start=1):
        if log.run and not line:
            continue
        try:
            kind, fields = parse_line(line)
            if (kind == 'run') == bool(log.run):
                raise ValueError('a log is of one run and begins with its line')
            if kind == 'run' and not {'experiment', 'dataset'} <= set(fields):
                raise ValueError('no experiment or no dataset')
        except ValueError as error:
            raise ValueError(f'{name}:{number}: {error}') from None
        if kind in ('run', 'hparams'):
            setattr(log, kind, fields)
        else:
            getattr(log, f'{kind}s').append(fields)
    return log


def read_log(path):
    """The one run in a file; a last line that was cut off is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `parse_log`.
    """
    with open(path, encoding='utf-8', errors='replace') as file:
        text = file.read()
    return parse_log(text[:text.rfind('\n') + 1], str(path))


def _version(package):
    # The module knows more than the package does: 2.15.0+cu132.
    version = getattr(sys.modules.get(package), '__version__', None)
    return version or importlib.metadata.version(package)


def _commit():
    """Seven digits, and '-dirty' unless all code is committed; or 'none'."""
    # GIT_DIR and its like, set inside a hook, would point at another one.
    environment = {k: v for k, v in os.environ.items() if k[:4] != 'GIT_'}
    try:  # No locks: several experiments may start at once.
        first, *files = subprocess.run(
            'git --no-optional-locks status --porcelain=v2 --branch -uall'.
            split(),
            cwd=os.path.dirname(os.path.abspath(__file__)),
            env=environment,
            capture_output=True,
            check=True,
            text=True,
            timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return 'none'
    commit = first.removeprefix('# branch.oid ')
    # A log saved beside the code is no change, a fork not yet added is one.
    dirty = any(
        line[0] in '12u' or re.match(r'\?.*\.py"?$', line) for line in files)
    return 'none' if commit == '(initial)' else commit[:7] + '-dirty' * dirty


def mean(finals):
    """Fields of the `mach mean` line from those of the MACHs' lines.

    A nan in one of `RESULTS` makes the mean nan. In other fields it says that
    there is nothing to count, as the staleness of a MACH without parents: the
    result is that of the other MACHs.
    """
    fields = dict(mach='mean')
    for key, combine in COMBINE.items():
        values = [final.get(key, math.nan) for final in finals]
        if key not in RESULTS:
            values = [value for value in values if not math.isnan(value)]
        if any(key in final for final in finals):
            fields[key] = combine(values or [math.nan])
    return fields


def say(kind, /, **fields):
    """Prints a line of the log above a progress bar, at once, to all `OUTPUTS`.

    Raises:
        OSError: stdout is closed or full, so that the log would be lost.
    """
    for output in OUTPUTS:
        output = output or sys.stdout
        if output is None:  # as after `>&-`
            raise OSError('stdout is closed')
        tqdm.tqdm.write(format_line(kind, **fields), file=output)
        output.flush()


def say_run(experiment, dataset, settings):
    """Prints the first two lines of the log.

    Args:
        experiment: its name.
        dataset: has a name and train_, validation_ and test_labels.
        settings: dataclass of the hyperparameters, the precision chosen.
    """
    say('run',
        experiment=experiment,
        dataset=dataset.name,
        train=len(dataset.train_labels),
        validation=len(dataset.validation_labels),
        test=len(dataset.test_labels),
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        torch=_version('torch'),
        torchvision=_version('torchvision'),
        numpy=_version('numpy'),
        python=platform.python_version(),
        commit=_commit())
    say('hparams', **dataclasses.asdict(settings))


def say_finals(experiment, dataset, settings, finals):
    """Prints the final lines: of every MACH, failed ones too, and their mean.

    Args:
        experiment, dataset, settings: as in `say_run`.
        finals: of each MACH a dict of mach, synthetic, real (in %), totals.
    """
    for final in [*finals, mean(finals)]:
        say('final',
            experiment=experiment,
            dataset=dataset.name,
            seed=settings.seed,
            **final)


def _flaw(log):
    """Why a run does not count; None if it does."""
    if log.mean is None:
        return 'no final line of mach mean'
    if any(math.isnan(log.mean.get(key, 0)) for key in RESULTS):
        return 'a MACH failed'
    steps, asked = log.mean.get('steps', math.inf), log.hparams.get('steps', 0)
    return f'{steps} of {asked} steps' if steps < asked else None


def _cell(logs, key, decimals=2):
    """'mean +- std' of the numbers there are; std is the sample's (n - 1)."""
    values = [log.mean[key] for log in logs if key in log.mean]
    if not values:
        return '-'
    text = f'{statistics.fmean(values):.{decimals}f}'
    if len(values) > 1:
        text += f' +- {statistics.stdev(values):.{decimals}f}'
    return text


def _group(logs):
    """(experiment, dataset, settings), logs connected, logs isolated: a row."""
    groups = {}
    for log in logs:
        if _flaw(log):
            print(f'{log.name}: {_flaw(log)}, left out', file=sys.stderr)
            continue
        settings = {
            key: value
            for key, value in log.hparams.items()
            if key not in BOOKKEEPING
        }
        isolated = not settings.pop('connected', True)
        row = log.run['experiment'], log.run['dataset'], settings
        key = (*row[:2], frozenset(settings.items()))
        runs = groups.setdefault(key, (row, [], []))[1 + isolated]
        seed = log.run.get('seed')
        if seed in [run.run.get('seed') for run in runs]:
            print(f'{log.name}: seed {seed} counts again', file=sys.stderr)
        runs.append(log)
    return list(groups.values())


def compare(logs):
    """A table of runs; a row for each experiment, dataset and hyperparameters.

    Accuracies in %, seconds of training: mean +- std over the n runs that
    differ in `BOOKKEEPING` alone, '-' for what is missing. A run with
    `connected False` gives its real accuracy to the column isolated, in the
    row of the same hyperparameters connected or in one of its own. A last
    column names the settings in which an experiment's rows differ. Left out,
    with a warning on stderr, are runs that stopped early and those in which a
    MACH failed; one of a seed that was there before counts, with a warning.
    """
    groups = _group(logs)
    rows = [('experiment', 'dataset', 'k', 'n', 'real', 'synthetic', 'isolated',
             'seconds', 'differs in')]
    for (experiment, dataset, settings), connected, isolated in groups:
        rivals = [row[2] for row, *_ in groups if row[0] == experiment]
        names = dict.fromkeys(name for rival in rivals for name in rival)
        differs = [
            f'{name} {settings.get(name, "-")}' for name in names
            if name != 'k' and len({rival.get(name) for rival in rivals}) > 1
        ]
        runs = connected or isolated
        alone = _cell(isolated, 'real')
        if isolated and len(isolated) != len(runs):
            alone += f' (n={len(isolated)})'
        rows.append((experiment, dataset, settings.get('k', '-'), len(runs),
                     _cell(connected, 'real'), _cell(connected,
                                                     'synthetic'), alone,
                     _cell(runs, 'seconds', 1), ', '.join(differs)))
    rows = [[str(cell) for cell in row] for row in rows]
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def choose_precision(asked, device):
    """The precision of matrix products: `asked`, unless that is 'auto'.

    On a processor that is the faster for a product of such a size, on trial: it
    may know the bf16 instructions and yet gain nothing from them.

    Args:
        asked: 'fp32', 'bf16' or 'auto'.
        device: such as 'cpu' or 'cuda:0'.
    """
    if asked != 'auto':
        return asked
    import torch  # pylint: disable=import-outside-toplevel
    if device.startswith('cuda'):
        return 'bf16' if torch.cuda.is_bf16_supported() else 'fp32'
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        some = torch.zeros(512, 784, dtype=dtype)
        seconds[dtype] = min(
            timeit.repeat(lambda x=some: torch.nn.functional.linear(x, x),
                          timer=time.perf_counter,
                          number=1))
    faster = 1.3 * seconds[torch.bfloat16] < seconds[torch.float32]
    return 'bf16' if faster else 'fp32'
