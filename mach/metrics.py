"""What a MACH counts, and the log of every experiment.

A line of a log is its kind, then `key value` fields, two spaces between them:

    hparams  k 1  steps 3000  batch_size 64
    step  400  mach 2  loss 0.2131  train 97.41

This file does not import torch, so that `--compare` starts at once.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import tqdm

# Decimals of measured values. A hyperparameter keeps every digit.
DECIMALS = dict(rate=1, seconds=1, steps=0, loss=4, synthetic_loss=4)
DECIMALS |= dict.fromkeys(('train', 'synthetic', 'real', 'worth', 'staleness'),
                          2)
# Hyperparameters that may differ between repetitions of one experiment. Of
# these only the seed and the data change the result.
BOOKKEEPING = ('seed', 'data', 'log_every', 'evaluate_every', 'edges',
               'dry_run', 'checkpoint', 'checkpoint_every', 'resume', 'hosts',
               'log_folder', 'tensorboard')
# Fields of the run line that may change the result, as hyperparameters do.
SOURCE = ('dataset', 'commit', 'threads', 'processes')
# What means nothing to a MACH without neighbours.
MESSAGES = ('neighbours', 'depth', 'grad_depth', 'any_rows_every', 'inputs',
            'deadline', 'share', 'grad_weight', 'alone', 'latency', 'jitter',
            'loss_rate', 'student_hidden', 'student_learning_rate')
# Signals that end a run. Windows has no SIGHUP.
SIGNALS = [
    getattr(signal, name)
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
    if hasattr(signal, name)
]
# The files that `say` writes to; None is stdout. FAILED: errors of such a file.
OUTPUTS, FAILED = [None], []
# A MACH with nan in one of these fields has failed. The mean becomes nan too.
RESULTS = ('synthetic', 'real', 'steps', 'rate')
# How the mean line combines the lines of the MACHs, in the order of its keys.
COMBINE = dict.fromkeys((*RESULTS, 'staleness'), statistics.fmean)
COMBINE |= dict(staleness_max=max, dropped=sum, seconds=max, lost=sum)
COMBINE |= dict(in_flight=sum)
# A line of the log. The kinds of lines that a reader needs, with the forms of
# what tables and pictures use as numbers. A form with ? allows a missing field.
LINE = r'\w+(  \w+ \S+( \S+)*)+'
WHOLE, NUMBER = r'\d{1,16}', r'\d{1,16}(\.\d+)?(e[+-]\d\d)?'
SETTINGS = 'k', 'latency', 'loss_rate', 'skew', 'steps'
MEASURED = dict.fromkeys(DECIMALS, f'(nan|-?{NUMBER})?')
KINDS = dict(run={}, hparams=dict.fromkeys(SETTINGS, f'({NUMBER})?'))
KINDS |= dict(shard=dict(mach=WHOLE, classes=f'{WHOLE}(,{WHOLE})*'))
KINDS |= dict(eval=MEASURED | dict.fromkeys(('step', 'seconds'), NUMBER))
KINDS |= dict(edge=dict(mach=WHOLE, child=WHOLE, worth=f'nan|-?{NUMBER}'))
KINDS |= dict(step=MEASURED, final=MEASURED)
# What people type -> the hyperparameter that they mean.
SYNONYMS = dict(
    pair.split(':') for pair in (
        'lr:learning_rate bs:batch_size batch:batch_size wd:weight_decay '
        'epochs:steps iterations:steps workers:k nodes:k world_size:k '
        'gpu:device cuda:device dir:data dataset:data').split())

tqdm.tqdm.monitor_interval = 0  # no thread that would outlive the run


class Tally:
    """What one MACH counts while it trains.

    Attributes:
        index: the number of the MACH.
        steps: training steps taken.
        seconds: wall time from `begin` to the end of the last step.
        staleness_max: the largest staleness of an applied Grad, in steps.
        dropped: messages that were never used; callers add to it directly.
        in_flight: messages that are still on their way; callers set it.
        lost_to: neighbour -> messages that got lost on the way to it.
        grads: parent -> [Grads of it that were applied, sum of staleness].
    """

    def __init__(self, index):
        self.index = index
        self.steps = self.staleness_max = self.dropped = self.in_flight = 0
        self.seconds = 0.0
        self.lost_to, self.grads = {}, {}
        self._open_window()
        self.begin()

    def _open_window(self):
        self._batches = self._images = self._correct = self._lessons = 0
        self._loss = self._synthetic_loss = 0.0

    def begin(self):
        """Starts the clock. It goes on from the end of the last step."""
        self._began = time.perf_counter() - self.seconds

    def step(self, loss, logits, y):
        """Counts one training step.

        Args:
            loss: the target loss, a scalar tensor.
            logits: [B, 10].
            y: labels [B].
        """
        self.steps += 1
        self._batches += 1
        self._images += len(y)
        self._correct += (logits.argmax(1) == y).sum().item()
        self._loss += loss.item()
        self.seconds = time.perf_counter() - self._began

    def lesson(self, loss):
        """Counts one step of the student; `loss` is a scalar tensor."""
        self._lessons += 1
        self._synthetic_loss += loss.item()

    def grad(self, staleness, parent):
        """Counts one applied Grad; `staleness` is in steps."""
        grads, total = self.grads.get(parent, (0, 0))
        self.grads[parent] = [grads + 1, total + staleness]
        self.staleness_max = max(self.staleness_max, staleness)

    @property
    def staleness(self):
        """Mean staleness over the run, in steps; nan without any Grad."""
        grads, total = map(sum, zip((0, 0), *self.grads.values()))
        return _ratio(total, grads)

    @property
    def lost(self):
        """Messages that got lost on the way to a neighbour."""
        return sum(self.lost_to.values())

    @property
    def rate(self):
        """Training steps a second, over the run."""
        return self.steps / self.seconds if self.seconds else 0.0

    def report(self):
        """Fields of a `step` line; losses and accuracy since the last call."""
        fields = dict(step=self.steps, mach=self.index)
        fields['loss'] = _ratio(self._loss, self._batches)
        fields['train'] = _ratio(100 * self._correct, self._images)
        fields['synthetic_loss'] = _ratio(self._synthetic_loss, self._lessons)
        fields |= dict(staleness=self.staleness, rate=self.rate)
        self._open_window()
        return fields

    def totals(self):
        """Fields of a `final` line, over the run."""
        names = ('steps', 'rate', 'staleness', 'staleness_max', 'dropped',
                 'seconds', 'lost', 'in_flight')
        return {name: getattr(self, name) for name in names}

    def copy(self):
        """A copy; its MACH may go on counting meanwhile, on another thread."""
        made = Tally(self.index)
        vars(made).update(vars(self))
        # Each of these is copied at once: no loop sees a dict that grows.
        made.lost_to, made.grads = self.lost_to.copy(), self.grads.copy()
        return made

    def state_dict(self):
        """All counts, as plain numbers and dicts of them; not a copy."""
        return dict(vars(self))

    def load_state_dict(self, state):
        """Takes the counts over and starts the clock."""
        vars(self).update(state)
        for name in 'lost_to', 'grads':  # JSON has turned its keys into text
            setattr(self, name, {int(i): n for i, n in state[name].items()})
        self.begin()


def _ratio(total, count):
    return total / count if count else math.nan


def format_line(kind, /, **fields):
    """One line of the log, without the newline.

    Measured floats are rounded. No value breaks the line: white space becomes
    one space, and an empty value becomes '-'.
    """
    words = [kind]
    for key, value in fields.items():
        if isinstance(value, float) and key in DECIMALS and kind != 'hparams':
            value = f'{value:.{DECIMALS[key]}f}'
        text = ' '.join(str(value).split()) or '-'
        # A step line shows its number without the key.
        words.append(text if kind == key == 'step' else f'{key} {text}')
    return '  '.join(words)


def parse_line(line):
    """The kind and the fields of a line, with numbers and bools converted.

    Raises:
        ValueError: the line is not in the grammar; the message quotes it.
    """
    text = re.sub('^step  ', 'step  step ', line.rstrip('\n'))
    if not re.fullmatch(LINE, text):
        raise ValueError(f'not a log line: {line!r:.100}')
    kind, *words = text.split('  ')
    pairs = (word.split(' ', maxsplit=1) for word in words)
    return kind, {key: _convert(key, value) for key, value in pairs}


def _convert(key, text):
    if key == 'commit':  # which may look like a number: 12e4567
        return text
    if text in ('True', 'False'):
        return text == 'True'
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    return text


class Log:
    """What one run wrote. An interrupted run may have no finals.

    Attributes:
        name: the file, for messages.
        run, hparams: the fields of these lines.
        shards, steps, evals, finals, edges: the fields of each such line, in
            order.
        skipped: how many lines were no log lines.
    """

    def __init__(self, name):
        self.name, self.skipped = name, 0
        self.run, self.hparams = {}, {}
        self.shards, self.steps, self.evals = [], [], []
        self.finals, self.edges = [], []

    @property
    def mean(self):
        """The final line of `mach mean`, or None."""
        return next((f for f in self.finals if f.get('mach') == 'mean'), None)


def parse_log(text, name='log'):
    """The one run in a text. Lines of unknown kinds are skipped.

    So are lines that begin like none of a log: of a launcher, or a print().

    Raises:
        ValueError: the text is not one log; the message begins with name:line.
    """
    log = Log(name)
    for number, line in enumerate(text.rstrip('\n').split('\n'), start=1):
        if line.split('  ')[0].rstrip() not in KINDS:
            log.skipped += not re.fullmatch(LINE, line)
            continue
        try:
            kind, fields = parse_line(line)
            if (kind == 'run') == bool(log.run):
                raise ValueError('the first line of a log is its one run line')
            for key, form in KINDS[kind].items():
                if not re.fullmatch(form, str(fields.get(key, ''))):
                    raise ValueError(f'{key} is missing or bad: {line!r:.100}')
            seed, there = log.run.get('seed'), len(log.shards)
            if (kind == 'final' and fields.get('seed', seed) != seed or
                    kind == 'shard' and fields['mach'] != there or
                    kind == 'edge' and
                    max(fields['mach'], fields['child']) >= there):
                raise ValueError('it does not fit the lines above')
        except ValueError as error:
            raise ValueError(f'{name}:{number}: {error}') from None
        if kind in ('run', 'hparams'):
            setattr(log, kind, fields)
        else:
            getattr(log, f'{kind}s').append(fields)
    if not log.run:
        raise ValueError(f'{name}: no run line')
    return log


def read_log(path):
    """The one run in a file, without a last line that was cut off.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `parse_log`.
    """
    with open(path, 'rb') as file:
        data = file.read()
    # A shell on Windows may write UTF-16, or a byte-order mark.
    code = 'utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig'
    text = re.sub('\r\n?', '\n', data.decode(code, 'replace'))
    return parse_log(text[:text.rfind('\n') + 1], str(path))


def flaw(log):
    """Why a run does not count, or None."""
    if log.mean is None:
        return 'no final line of mach mean'
    if any(math.isnan(log.mean.get(key, 0)) for key in (*RESULTS, 'seconds')):
        return 'a MACH failed'
    steps, asked = log.mean.get('steps', math.inf), log.hparams.get('steps', 0)
    return f'{steps} of {asked} steps' if steps < asked else None


def isolated(log):
    """Whether the MACHs of a run have no neighbours."""
    return not log.hparams.get('connected', True)


def settings(log, hidden=()):
    """Hyperparameters and SOURCE of a run, without BOOKKEEPING and `hidden`.

    Those of an isolated run are without MESSAGES too.
    """
    shared = log.hparams | {k: log.run[k] for k in SOURCE if k in log.run}
    hidden = (*BOOKKEEPING, *hidden, *(MESSAGES if isolated(log) else ()))
    return {k: v for k, v in shared.items() if k not in hidden}


def group(logs, hidden=()):
    """Lists of the logs that share experiment and `settings`."""
    groups = {}
    for log in logs:
        row = frozenset(settings(log, hidden).items())
        groups.setdefault((log.run.get('experiment'), row), []).append(log)
    return list(groups.values())


def without_edges(log, logs):
    """Those of the logs that are the same run as `log` with `connected False`.

    They may be of another commit.
    """
    hidden = *MESSAGES, 'connected', 'commit'
    return [
        one for one in logs
        if isolated(one) and one.run.get('experiment') == log.run.get(
            'experiment') and settings(one, hidden) == settings(log, hidden)
    ]


def differs(log, groups, hidden=()):
    """'depth 1, steps 400': in what the groups of its experiment differ.

    Args:
        log: the first of a group.
    """
    firsts = [
        one for one, *_ in groups
        if one.run.get('experiment') == log.run.get('experiment')
    ]
    keys, parts = [key for one in firsts for key in settings(one, hidden)], []
    for name in dict.fromkeys(keys):
        of = [
            one for one in firsts if not isolated(one) or name not in MESSAGES
        ]
        if log in of and len({settings(one).get(name) for one in of}) > 1:
            parts.append(f'{name} {settings(log).get(name, "-")}')
    return ', '.join(parts)


def lines(logs, *hidden):
    """Label -> logs that are alike, but for `hidden` and the commit."""
    hidden, found = (*hidden, 'commit'), {}
    groups = group(logs, hidden)
    for same in groups:
        words = str(same[0].run.get('experiment')), differs(
            same[0], groups, hidden)
        found.setdefault(', '.join(filter(None, words)), []).extend(same)
    return found


def curve(logs, by, x, y):
    """[(mean x, mean y, standard deviation of y)], for each value of a field.

    Args:
        by, x, y: fields of `eval` lines if `by` is step, else of the
            hyperparameters and the final mean; the rate is that of the slowest
            MACH. A nan does not count.
    """
    values, points = {}, []
    for log in logs:
        rates = [final['rate'] for final in log.finals if 'rate' in final]
        slowest = dict(rate=min(rates, default=math.nan))
        rows = [log.mean | slowest | {by: log.hparams.get(by)}]
        if by == 'step':  # a resumed run may repeat one: the last line counts
            rows = {line['step']: line for line in log.evals}.values()
        for row in rows:
            if row[by] is not None and not math.isnan(row.get(y, math.nan)):
                values.setdefault(row[by], []).append((row[x], row[y]))
    for _, pairs in sorted(values.items()):
        xs, ys = zip(*pairs)
        std = statistics.stdev(ys) if len(ys) > 1 else 0.0
        points.append((statistics.fmean(xs), statistics.fmean(ys), std))
    return points


def _commit():
    """Seven digits, with '-dirty' if a .py file is not committed; or 'none'."""
    # Without locks, several experiments can start at once.
    # The checkout of another user is as good as one's own.
    command = ('git --no-optional-locks -c safe.directory=* status '
               '--porcelain=v2 --branch -uall -- :/*.py')
    # In a git hook, these variables point at another repository.
    environment = {k: v for k, v in os.environ.items() if k[:4] != 'GIT_'}
    try:
        status = subprocess.check_output(command.split(),
                                         cwd=os.path.dirname(__file__),
                                         env=environment,
                                         stderr=subprocess.DEVNULL,
                                         text=True,
                                         timeout=10)
    except (OSError, subprocess.SubprocessError):
        return 'none'
    commit, *others = status.removeprefix('# branch.oid ').splitlines()
    dirty = any(not line.startswith('#') for line in others)
    return 'none' if commit == '(initial)' else commit[:7] + '-dirty' * dirty


def mean(finals):
    """Fields of the `mach mean` line from the fields of the MACHs' lines.

    A nan in one of `RESULTS` makes that mean nan. In other fields a nan means
    that there was nothing to count, so the mean ignores it.
    """
    fields = dict(mach='mean')
    for key, combine in COMBINE.items():
        values = [final.get(key, math.nan) for final in finals]
        if key not in RESULTS:
            values = [value for value in values if not math.isnan(value)]
        if any(key in final for final in finals):
            fields[key] = combine(values or [math.nan])
    return fields


def warn(text):
    """Prints a line on stderr, above a progress bar; no error if that fails."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.tqdm.write(text + '\n', sys.stderr, end='')  # one write


def say(kind, /, **fields):
    """Prints a line of the log to all `OUTPUTS`, above a progress bar, at once.

    If a file is closed or full, FAILED gets the error, and later lines go to
    stderr, as does this one. The caller then ends the run.
    """
    line = format_line(kind, **fields)
    for i, output in enumerate(OUTPUTS):
        output = output or sys.stdout
        try:
            if output is None:  # after `>&-`
                raise OSError('it is closed')
            code = output.encoding or 'utf-8'  # some cannot express all paths
            text = line.encode(code, 'backslashreplace').decode(code)
            tqdm.tqdm.write(text, file=output)
            output.flush()
        except (OSError, ValueError) as error:
            if output is not sys.stderr:
                FAILED.append(error)
                OUTPUTS[i] = sys.stderr
                name = getattr(output, 'name', 'stdout')
                warn(f'cannot write the log to {name}: {error}; the run ends')
                if kind != 'run':
                    warn(line)


class Board(io.TextIOBase):
    """An output of `say`: the curves of `tensorboard --logdir FOLDER`.

    Each MACH has a folder, and so has the mean. Each line is written at once. A
    SummaryWriter writes in a thread, which a full disk ends with a traceback.

    Raises:
        OSError: the folder cannot be written, or the package cannot be used.
    """

    def __init__(self, experiment, settings):
        self._hparams = dataclasses.asdict(settings)
        # Runs of one seed stay apart, even those of the same second.
        now = time.strftime(f'%Y%m%d-%H%M%S-{os.getpid()}')
        name = f'{experiment}.seed{settings.seed}.{now}'
        self._folder = os.path.join(settings.tensorboard, name)
        os.makedirs(settings.tensorboard, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.tensorboard).close()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self._board = importlib.import_module('torch.utils.tensorboard')
        except Exception as error:  # pylint: disable=broad-except
            raise OSError('--tensorboard needs: pip install tensorboard '
                          f'({type(error).__name__})') from error

    def write(self, text):
        """Takes a line of the log. After an error it takes no more."""
        if self._folder and text.split('  ')[0] in ('step', 'eval', 'final'):
            try:
                self._write(*parse_line(text))
            except Exception as error:  # pylint: disable=broad-except
                self._folder = ''
                warn(f'warning: no more curves for tensorboard: {error}')

    def _write(self, kind, fields):
        board, parts = self._board, []
        step = fields.pop('step', fields.get('steps'))
        mach, _ = fields.pop('mach'), fields.pop('seed', None)
        curves = {f'{kind}/{key}': value for key, value in fields.items()}
        if (kind, mach) == ('final', 'mean'):
            found = {f'hparam/{key}': fields[key] for key in RESULTS[:2]}
            parts += board.summary.hparams(self._hparams, found)
            curves |= found
        for key, value in curves.items():
            if not isinstance(value, str):
                parts.append(board.summary.scalar(key, value))
        path = f'{self._folder}/mach {mach}/events.out.tfevents.mach'
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'ab') as file:
            for part in parts:
                event = board.writer.Event(step=step, summary=part)
                event.wall_time = time.time()
                board.RecordWriter(file).write(event.SerializeToString())


def boards(experiment, settings):
    """A list of the Board, if --tensorboard asks for one."""
    return [Board(experiment, settings)] if settings.tensorboard else []


def say_run(experiment, dataset, settings, shards, threads, processes=1):
    """Prints the first lines of the log: run, hparams, and one of each shard.

    Args:
        experiment: its name.
        dataset: has a name and train_, validation_ and test_labels.
        settings: dataclass of the hyperparameters, with the chosen precision.
        shards: for each MACH the number of its images of each class, a tensor.
        threads: how many compute at once; processes: how many there are.
    """
    modules = map(importlib.import_module, ('torch', 'torchvision', 'numpy'))
    versions = {module.__name__: module.__version__ for module in modules}
    # Products differ in their last digits between instruction sets.
    cpu = importlib.import_module('torch.backends.cpu').get_cpu_capability()
    say('run',
        experiment=experiment,
        dataset=dataset.name,
        train=len(dataset.train_labels),
        validation=len(dataset.validation_labels),
        test=len(dataset.test_labels),
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        **versions,
        python=platform.python_version(),
        commit=_commit(),
        threads=threads,
        processes=processes,
        cpu=cpu)
    if not FAILED:
        say('hparams', **dataclasses.asdict(settings))
    for i, classes in enumerate(() if FAILED else shards):
        counts = ','.join(map(str, classes.tolist()))
        say('shard', mach=i, images=int(classes.sum()), classes=counts)


def say_finals(experiment, dataset, settings, found, snapshots):
    """Prints the final line of every MACH, their mean's, and one of each edge.

    The counts of an edge are of what the MACH sent to the child: Grads that the
    child applied, how late they were, and messages of all kinds that got lost.

    Args:
        experiment, dataset, settings: as in `say_run`.
        found: a dict for each MACH: mach, synthetic and real (in %), worth,
            which is a dict: child -> what its answers add to `real`, in points.
        snapshots: index -> has the MACH's Tally as `tally`.
    """
    head = dict(experiment=experiment, dataset=dataset.name, seed=settings.seed)
    worths = {one['mach']: one.pop('worth', {}) for one in found}
    tallies = {i: one.tally for i, one in snapshots.items()}
    finals = [one | tallies[one['mach']].totals() for one in found]
    for final in [*finals, mean(finals)]:
        say('final', **head, **final)
    for i, worth in worths.items():
        for child, points in worth.items():
            grads, total = tallies[child].grads.get(i, (0, 0))
            say(
                'edge',
                mach=i,
                child=child,
                worth=round(points, 2) + 0.0,  # never -0.00
                staleness=_ratio(total, grads),
                messages=grads,
                lost=tallies[i].lost_to.get(child, 0))


def choose_precision(asked, device):
    """The precision of matrix products: `asked`, unless that is 'auto'.

    'auto' is bf16 where the processor multiplies bf16 numbers itself, else
    fp32. A GPU is asked by torch. A CPU must have avx512_bf16 or amx_bf16 among
    its flags in /proc/cpuinfo; so it is fp32 beyond Linux. Elsewhere bf16 works
    and is slower. No measurement has a say: on a busy machine it would differ.

    Args:
        asked: 'fp32', 'bf16' or 'auto'.
        device: such as 'cpu' or 'cuda:0'.
    """
    if asked != 'auto':
        return asked
    if device.startswith('cuda'):
        import torch  # pylint: disable=import-outside-toplevel
        can = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return 'bf16' if can else 'fp32'
    flags = set()
    with contextlib.suppress(OSError):
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            flags.update(file.read().split())
    return 'bf16' if flags & {'avx512_bf16', 'amx_bf16'} else 'fp32'


def start(thread, what):
    """Starts a thread; False, with a warning, if the system allows no more."""
    try:
        thread.start()
        return True
    except RuntimeError as error:
        warn(f'{what} failed: {error}')
        return False


@contextlib.contextmanager
def catch_signals(end):
    """Has the first signal call end(number). One a second later exits at once.

    Within that second, a terminal and a launcher may both pass on one Ctrl-C.
    """
    times, before = [], {}

    def handle(number, _):
        times.append(time.monotonic())
        if times[-1] > times[0] + 1:
            os._exit(128 + number)
        if len(times) == 1:
            end(number)
            with contextlib.suppress(OSError):  # print cannot interrupt print
                os.write(2, b'ends with the results so far; again: at once\n')

    # Python handles signals in the main thread alone. nohup ignores SIGHUP.
    main = threading.current_thread() is threading.main_thread()
    for number in SIGNALS * main:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(status):
    """Ends the process, without waiting for a thread in the midst of a step.

    A profiler that runs the script writes its results first.
    """

    def end():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        os._exit(status)

    # An atexit function would come too late: after the wait for threads.
    threading._register_atexit(end)  # pylint: disable=protected-access
    sys.exit(status)


def explain(word, names):
    """What to say about an unknown word of a command line.

    Args:
        word: such as '--lr', or '2' of `--seed 1 2`.
        names: of all hyperparameters and options.
    """
    name = word.split('=')[0].lstrip('-').replace('-', '_')
    if not word.startswith('-'):
        return f'{word} belongs to no option: each one takes one value'
    near = difflib.get_close_matches(SYNONYMS.get(name, name), names, 1)
    return f'no option {word}; ' + (f'the closest is --{near[0]}'
                                    if near else '--help names them all')
