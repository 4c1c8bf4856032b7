"""The log every experiment writes, and the table that compares saved logs.

A line of a log is its kind, then `key value` fields, two spaces between them:

    hparams  k 1  steps 3000  batch_size 64
    step  400  mach 2  loss 0.2131  train 97.41

Torch is not imported here, so that comparing logs does not wait for it.
"""

import collections
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
import urllib.parse

KINDS = ('run', 'hparams', 'step', 'eval', 'final')
# Decimals of what was measured; a hyperparameter of the same name keeps all.
DECIMALS = dict(train=2, synthetic=2, real=2, staleness=2, loss=4)
DECIMALS |= dict(synthetic_loss=4, rate=1, seconds=1, steps=1)
# Hyperparameters that leave the result alone: runs that differ in nothing else
# are repetitions of one experiment.
BOOKKEEPING = ('seed', 'data', 'strict_data', 'log_every', 'evaluate_every')
# How the mean line comes from those of the MACHs, in the order of its keys.
COMBINE = dict.fromkeys(('synthetic', 'real', 'steps', 'rate', 'staleness'),
                        statistics.fmean)
COMBINE |= dict(staleness_max=max, dropped=sum, seconds=max, lost=sum)

_KEY = re.compile('[A-Za-z_][A-Za-z0-9_]*')
_INT = re.compile('[+-]?[0-9]+')
_FLOAT = re.compile(r'[+-]?([0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?|inf|nan)')


def _percent(character: str) -> str:
    # surrogatepass: a path that is not valid UTF-8 holds lone surrogates.
    encoded = character.encode('utf-8', 'surrogatepass')
    return ''.join(f'%{byte:02X}' for byte in encoded)


def _write(kind: str, key: str, value) -> str:
    """One value as text without a run of spaces or a line break in it."""
    if hasattr(value, 'item'):  # A number of numpy or torch.
        value = value.item()
    if isinstance(value, float) and key in DECIMALS and kind not in KINDS[:2]:
        return f'{value:.{DECIMALS[key]}f}'
    if isinstance(value, (bool, int, float)):
        return repr(value)
    text = ''.join(
        _percent(c) if c == '%' or not c.isprintable() else c
        for c in str(value))
    text = re.sub('^ |(?<= ) | $', '%20', text)
    if not isinstance(_read(key, text), str):  # '5' must not come back as 5.
        text = _percent(text[0]) + text[1:]
    return text or '%'


def _read(key: str, text: str):
    """The value `_write` wrote."""
    if text == '%':
        return ''
    if key != 'commit':  # One of digits only, or like 12e4567, is no number.
        if text in ('True', 'False'):
            return text == 'True'
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
    if re.search('%(?![0-9A-F]{2})', text):
        raise ValueError('a % without two hex digits')
    return urllib.parse.unquote(text, errors='surrogatepass')


def format_line(kind: str, /, **fields) -> str:
    """One line of the log, without the newline.

    Args:
        kind: one of `KINDS`.
        **fields: int, float, bool or str, written in this order; numbers of
            numpy and torch too. Floats of step, eval and final lines are
            rounded as `DECIMALS` says, others keep every digit. A string may
            hold anything: what would break the line is percent-escaped. Of
            anything else (None, a path) the str() is written.

    Raises:
        ValueError: the kind or a key is not in the grammar.
    """
    if kind not in KINDS or not all(map(_KEY.fullmatch, fields)):
        raise ValueError(f'no log line: {kind!r} of {", ".join(fields)}')
    words = [kind]
    for key, value in fields.items():
        text = _write(kind, key, value)
        if kind == key == 'step' and _INT.fullmatch(text):
            words.insert(1, text)  # Its number stands without a key.
        else:
            words.append(f'{key} {text}')
    return '  '.join(words)


def parse_line(text: str) -> tuple[str, dict] | None:
    """The kind and the fields of a line; None for an empty one.

    Values come back as bool, int, float or str. The bare number of a step line
    is its field `step`.

    Raises:
        ValueError: the line is not in the grammar; the message names it.
    """
    text = text.rstrip('\r\n')
    if not text.strip():
        return None
    kind, *words = text.split('  ')
    fields = {}
    try:
        if kind not in KINDS:
            raise ValueError(f'starts with none of {", ".join(KINDS)}')
        if kind == 'step' and words and _INT.fullmatch(words[0]):
            words[0] = f'step {words[0]}'
        for word in words:
            key, _, value = word.partition(' ')
            if not _KEY.fullmatch(key) or not value or value[-1] == ' ':
                raise ValueError(f'no "key value": {word!r}')
            if key in fields:
                raise ValueError(f'{key} twice')
            fields[key] = _read(key, value)
    except ValueError as error:
        raise ValueError(f'not a log line ({error}): {text!r:.100}') from None
    return kind, fields


@dataclasses.dataclass
class Log:
    """What one run wrote; an interrupted run has no finals.

    Attributes:
        name: the file, for messages.
        run, hparams: the fields of these lines.
        steps, evals, finals: the fields of each such line, in order.
    """
    name: str
    run: dict = dataclasses.field(default_factory=dict)
    hparams: dict = dataclasses.field(default_factory=dict)
    steps: list[dict] = dataclasses.field(default_factory=list)
    evals: list[dict] = dataclasses.field(default_factory=list)
    finals: list[dict] = dataclasses.field(default_factory=list)

    @property
    def mean(self) -> dict | None:
        """The final line of `mach mean`, or None."""
        return next((f for f in self.finals if f['mach'] == 'mean'), None)


def parse_log(source, name: str = 'log') -> Log:
    """The one run in `source`, a string or an iterable of lines.

    Raises:
        ValueError: no log, or several; one line that starts with `name` and the
            line's number.
    """
    log = Log(name)
    lines = source.split('\n') if isinstance(source, str) else source
    needed = dict(run=('experiment', 'dataset'), final=('mach',))
    seen = set()
    number = 1
    try:
        for number, line in enumerate(lines, start=1):
            kind, fields = parse_line(line) or (None, None)
            if kind is None:
                continue
            if kind != 'run' and 'run' not in seen:
                raise ValueError(f'{kind} before the run line')
            if kind in KINDS[:2] and kind in seen:
                raise ValueError(f'a second {kind} line: a log is of one run')
            if missing := set(needed.get(kind, ())) - set(fields):
                raise ValueError(f'{kind} without {" or ".join(missing)}')
            seen.add(kind)
            if kind in KINDS[:2]:
                setattr(log, kind, fields)
            else:
                getattr(log, f'{kind}s').append(fields)
        if not seen:
            raise ValueError('empty, no log')
    except ValueError as error:
        raise ValueError(f'{name}:{number}: {error}') from None
    return log


def read_log(path) -> Log:
    """The one run in a file.

    A last line that was cut off is left out, with a warning on stderr: its last
    number may have lost digits.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `parse_log`.
    """
    with open(path, encoding='utf-8', errors='replace') as file:
        text = file.read()
    whole, _, cut = text.rpartition('\n')
    if whole and cut:
        print(f'{path}: the last line is cut off, left out', file=sys.stderr)
        text = whole
    return parse_log(text, str(path))


def _git(*arguments: str) -> str | None:
    """Output of a git command in this file's repository, None if it fails."""
    # GIT_DIR and its like, set inside a hook, would point at another one.
    environment = {k: v for k, v in os.environ.items() if k[:4] != 'GIT_'}
    try:  # No locks: several experiments may start at once.
        return subprocess.run(['git', '--no-optional-locks', *arguments],
                              cwd=os.path.dirname(os.path.abspath(__file__)),
                              env=environment,
                              stdin=subprocess.DEVNULL,
                              capture_output=True,
                              check=True,
                              encoding='utf-8',
                              errors='replace',
                              timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str:
    # The module knows more than the package does: 2.15.0+cu132.
    version = getattr(sys.modules.get(package), '__version__', None)
    try:
        return str(version or importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return 'none'


def run_fields() -> dict:
    """Versions for the run line: torch, torchvision, numpy, python and commit.

    All are strings, 'none' for what is not there. The commit ends in '-dirty'
    unless the code is committed. Never raises.
    """
    packages = ('torch', 'torchvision', 'numpy')
    commit = (_git('rev-parse', '--short', 'HEAD') or 'none').strip()
    if commit != 'none':
        status = _git('status', '--porcelain', '--untracked-files=all')
        # A log saved beside the code is no change, a fork not yet added is one.
        if status is None or any(
                line[:2] != '??' or line.rstrip('"').endswith('.py')
                for line in status.splitlines()):
            commit += '-dirty'
    return dict(zip(packages, map(_version, packages)),
                python=platform.python_version(),
                commit=commit)


def accuracy(logits, labels) -> float:
    """Percentage of rows whose largest logit is the label's.

    Args:
        logits: tensor [N, classes].
        labels: integer tensor [N].

    Raises:
        ValueError: the shapes do not fit, or N is 0.
    """
    # Labels [N, 1] would compare every row with every label, unnoticed.
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f'no accuracy of logits {tuple(logits.shape)} and '
                         f'labels {tuple(labels.shape)}')
    return 100 * int((logits.argmax(-1) == labels).sum()) / len(labels)


class Stopwatch:
    """Seconds of training: it runs from `start` to `pause`."""

    def __init__(self):
        self._total = 0.0
        self._since = None

    def start(self):
        """Runs on; does nothing if it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self):
        """Stops, as for an evaluation; does nothing if it has stopped."""
        self._total, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds it has run so far, whether it runs or not."""
        if self._since is None:
            return self._total
        return self._total + time.perf_counter() - self._since


def mean_final(finals: list[dict]) -> dict:
    """Fields of the `mach mean` line from those of the MACHs' final lines.

    The mean of synthetic, real, steps, rate and staleness, the largest
    staleness_max and seconds, the sum of dropped; nothing is rounded, and a key
    that no MACH has is left out. A NaN makes the result NaN, lest a failed MACH
    flatter the mean. Only in staleness and staleness_max, where it says that
    the MACH received no Grad, the result is that of the others.

    Raises:
        ValueError: no finals, a mean among them, finals of different runs, or a
            key that only some of them have.
    """
    if not finals or any(final.get('mach') == 'mean' for final in finals):
        raise ValueError('the mean needs the final lines of the MACHs')
    mean = {}
    for key in ('experiment', 'dataset', 'seed'):
        values = {final.get(key) for final in finals}
        if len(values) > 1:
            raise ValueError(f'MACHs of different runs: {key} {values}')
        mean |= {key: value for value in values if value is not None}
    mean['mach'] = 'mean'
    for key, combine in COMBINE.items():
        values = [final[key] for final in finals if key in final]
        if values and len(values) < len(finals):
            raise ValueError(f'only some MACHs have {key}')
        numbers = [value for value in values if not math.isnan(value)]
        # max() of a NaN would depend on the order.
        if numbers == values or numbers and key.startswith('staleness'):
            mean |= {key: combine(numbers)} if numbers else {}
        else:
            mean[key] = math.nan
    if mean.get('steps', math.nan) % 1 == 0:
        mean['steps'] = int(mean['steps'])
    return mean


@dataclasses.dataclass
class _Group:
    """The runs of one row: repetitions, and the same without any edges."""
    experiment: str
    dataset: str
    settings: dict
    connected: list[Log] = dataclasses.field(default_factory=list)
    isolated: list[Log] = dataclasses.field(default_factory=list)


def _group(logs: list[Log]) -> list[_Group]:
    groups = {}
    for log in logs:
        settings = log.hparams | {
            key: log.run[key]
            for key in ('device', 'precision')
            if key in log.run
        }
        connected = settings.pop('connected', True)
        for key in BOOKKEEPING:
            settings.pop(key, None)
        steps = (log.mean or {}).get('steps', math.inf)
        if steps < settings.get('steps', 0):
            # Stopped early it has results too, but not those of the others.
            print(f'{log.name}: {steps} of {settings["steps"]} steps',
                  file=sys.stderr)
            settings['steps'] = steps
        name = [str(log.run.get(key, '-')) for key in ('experiment', 'dataset')]
        group = groups.setdefault((*name, repr(sorted(settings.items()))),
                                  _Group(*name, settings))
        (group.connected if connected else group.isolated).append(log)
    return list(groups.values())


def _cell(means: list[dict], key: str, decimals: int) -> str:
    """'mean +- std' of the numbers there are; std is the sample's (n - 1)."""
    values = [mean[key] for mean in means if key in mean]
    if not values or any(isinstance(value, str) for value in values):
        return '-'
    text = f'{statistics.fmean(values):.{decimals}f}'
    if len(values) > 1:  # stdev() raises on a NaN.
        finite = all(map(math.isfinite, values))
        std = statistics.stdev(values) if finite else math.nan
        text += f' +- {std:.{decimals}f}'
    return text


def compare(logs: list[Log]) -> str:
    """A table of runs; a row for each experiment, dataset and hyperparameters.

    Accuracies in %, seconds of training: mean +- std over the n runs that have
    a `mach mean` and differ in `BOOKKEEPING` alone, '-' for what is missing. A
    run with `connected False` gives its real accuracy to the column isolated,
    in the row of the same hyperparameters connected or in one of its own. A
    last column names the settings in which an experiment's rows differ. Runs
    of one seed all count, those that stopped early make a row of fewer steps,
    both with a warning on stderr. Rows come in the order of the logs.
    """
    groups = _group(logs)
    rows = [[
        'experiment', 'dataset', 'k', 'n', 'real', 'synthetic', 'isolated',
        'seconds', 'differs in'
    ]]
    for group in groups:
        for runs in group.connected, group.isolated:
            for seed, n in collections.Counter(
                    log.run.get('seed') for log in runs if log.mean).items():
                if n > 1:
                    print(f'{group.experiment}: seed {seed} counts {n} times',
                          file=sys.stderr)
        done = [log.mean for log in group.connected if log.mean]
        alone = [log.mean for log in group.isolated if log.mean]
        counted = done if group.connected else alone
        isolated = _cell(alone, 'real', 2)
        if alone and len(alone) != len(counted):
            isolated += f' (n={len(alone)})'
        # A run that died before it told its settings differs from none.
        rivals = [
            g.settings for g in groups if g.experiment == group.experiment
        ]
        rivals = [rival for rival in rivals if rival and group.settings]
        differing = [
            f'{key} {group.settings.get(key, "-")}' for key in dict.fromkeys(
                key for rival in rivals for key in rival)
            if key != 'k' and len({repr(r.get(key)) for r in rivals}) > 1
        ]
        rows.append([
            group.experiment, group.dataset,
            str(group.settings.get('k', '-')),
            str(len(counted)),
            _cell(done, 'real', 2),
            _cell(done, 'synthetic', 2), isolated,
            _cell(counted, 'seconds', 1), ', '.join(differing)
        ])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def choose_precision(asked, device) -> str:
    """The precision of matrix products: `asked`, unless that is 'auto'.

    'auto' is bf16 where a product of this project's shapes is measured to be at
    least 1.3 times as fast in it, and fp32 elsewhere: a processor may know the
    bf16 instructions and yet gain nothing from them.

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
    for name, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
        rows = torch.zeros(256, 784, dtype=dtype)
        weight = torch.zeros(512, 784, dtype=dtype)
        torch.nn.functional.linear(rows, weight)  # warm-up
        times = []
        for _ in range(9):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)  # the least disturbed one
    return 'bf16' if seconds['bf16'] * 1.3 < seconds['fp32'] else 'fp32'
