"""The layout, and `# Copied from`: a promise that a copy is what it was.

`# Copied from <path>` stands above a function, class or method and names the
file of the original, an object of the same name; or right below a module's
docstring, and then the whole file is a copy.
"""

import ast
import itertools
import re
import subprocess
import sys
import textwrap

import conftest
import pytest

ROOT = conftest.ROOT
EXPERIMENTS = conftest.SYNCHRONOUS + conftest.ASYNCHRONOUS
PACKAGES = ('torch', 'torchvision', 'numpy', 'tqdm')
MARKED_FROM = 6  # lines; a mark would outweigh shorter repetitions
MARK = re.compile(r'[ \t]*# Copied from (\S+)[ \t]*')
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SOURCES = {
    f'{name}/{path.name}': path.read_text(encoding='utf-8')
    for name in EXPERIMENTS for path in sorted((ROOT / name).glob('*.py'))
}

# ---------------------------------------------------------------- the checkers


class Module:
    """One source file: its definitions and its marks.

    Attributes:
        objects: (qualified name, text) of each definition; a text has its
            decorators but neither indentation nor marks.
        marks: qualified name -> path of the original; '' is the whole file.
        stray: numbers of the lines of marks that stand above nothing.
        text: the whole file without marks.
    """

    def __init__(self, source):
        lines, tree = source.splitlines(), ast.parse(source)
        self.objects, self.marks, self.stray, above = [], {}, [], {}
        self.text = plain(lines)
        places = [(tree, '')]
        for node, prefix in places:  # grows while it is gone through
            for child in ast.iter_child_nodes(node):
                inner = prefix
                if isinstance(child, DEFINITIONS):
                    decorators = [d.lineno for d in child.decorator_list]
                    first = min([child.lineno, *decorators])
                    name = prefix + child.name
                    text = plain(lines[first - 1:child.end_lineno])
                    self.objects.append((name, text))
                    above[first - 1], inner = name, f'{name}.'
                places.append((child, inner))
        below = tree.body[0].end_lineno + 1 if ast.get_docstring(tree) else 1
        while below <= len(lines) and not lines[below - 1].strip():
            below += 1
        above.setdefault(below, '')
        for number, line in enumerate(lines, start=1):
            mark = MARK.fullmatch(line)
            if mark and number in above:
                self.marks[above[number]] = mark[1]
            elif 'copied from' in line.lower():
                self.stray.append(number)

    def is_marked(self, name):
        """Whether a mark covers it: its own, its class's or the file's."""
        names = itertools.accumulate(name.split('.'), '{}.{}'.format)
        return not self.marks.keys().isdisjoint(['', *names])


def plain(lines):
    """Their text without marks, indentation and repeated blank lines."""
    text = '\n'.join(line for line in lines if not MARK.fullmatch(line))
    return textwrap.dedent(re.sub(r'\n{2,}', '\n\n', text)).strip()


def problems_of_marks(sources):
    """What is wrong with the marks; `sources` is path -> text of the file."""
    modules = {path: Module(text) for path, text in sources.items()}
    found = []
    for path, module in modules.items():
        found += [f'{path}:{n}: marks nothing' for n in module.stray]
        for name, origin in module.marks.items():
            what = f'{path}: {name or "the file"}, copied from {origin},'
            original, (_, dot, last) = modules.get(origin), name.rpartition('.')
            if original is None or origin == path:
                found.append(f'{what} has no such original')
                continue
            # A method may be of any class there, under the same name.
            texts = [original.text] if not name else [
                text for other, text in original.objects
                if (other.endswith(dot + last) if dot else other == name)
            ]
            copy = dict(module.objects).get(name, module.text)
            if not texts:
                found.append(f'{what} has no original of its name')
            elif copy not in texts:
                found.append(f'{what} has drifted')
    return found


def problems_of_repetitions(sources, lines=MARKED_FROM):
    """Definitions in several folders without a mark in all of them but one.

    Args:
        sources: path -> text of the file.
        lines: of how many lines on a definition is to be marked.
    """
    groups = {}
    for path, module in (
        (path, Module(text)) for path, text in sources.items()):
        for name, text in module.objects:
            if text.count('\n') + 1 >= lines:
                place = path, name, module.is_marked(name)
                groups.setdefault((name.rpartition('.')[2], text),
                                  []).append(place)
    found = []
    for places in groups.values():
        unmarked = [f'{path} {name}' for path, name, mark in places if not mark]
        if len({path.split('/')[0] for path, *_ in places
               }) > 1 and len(unmarked) > 1:
            found.append('the same, but not marked: ' + ', '.join(unmarked))
    return found


def forbidden_imports(source, siblings):
    """What a module of an experiment imports but may not.

    Args:
        source: text of the module.
        siblings: names of the modules in its folder.
    """
    allowed = {*sys.stdlib_module_names, *PACKAGES, *siblings}
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == 'mach':
            names += [f'mach.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append('.' * node.level + (node.module or ''))
    return [
        name for name in names
        if name not in ('mach.data',
                        'mach.metrics') and name.split('.')[0] not in allowed
    ]


# ---------------------------------------------------------------------- copies


def test_no_copy_has_drifted():
    assert problems_of_marks(SOURCES) == []


def test_repetitions_are_marked():
    assert problems_of_repetitions(SOURCES) == []


def test_the_repository_has_marks():
    assert sum(len(Module(text).marks) for text in SOURCES.values()) > 20


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_every_main_has_the_same_sections(experiment):
    names = re.findall('^# -+ (.+)', SOURCES[f'{experiment}/main.py'], re.M)
    assert names == 'hyperparameters MACHs threads evaluation summary'.split()


def test_hyperparameters_come_in_one_order():
    found = []
    for experiment in EXPERIMENTS:
        text = SOURCES[f'{experiment}/main.py']
        found.append(re.findall(r'^    (\w+): \w+ = hparam\(', text, re.M))
    for one, other in itertools.permutations(found, 2):
        shared = [name for name in one if name in other]
        assert {'seed', 'steps', 'learning_rate'} <= set(shared)
        assert shared == [name for name in other if name in one]


# ---------------------------------------------------------------------- layout


def test_layout():
    try:
        listed = subprocess.run(['git', 'ls-files', '-z'],
                                cwd=ROOT,
                                stdin=subprocess.DEVNULL,
                                capture_output=True,
                                check=True,
                                encoding='utf-8',
                                timeout=30).stdout.split('\0')
    except (OSError, subprocess.SubprocessError):
        listed = []
    # An unpacked archive can lie in a repository that knows nothing of it.
    if 'requirements.txt' not in listed:
        listed = [str(p.relative_to(ROOT)) for p in ROOT.glob('*/*')]
        listed += [path.name for path in ROOT.iterdir() if path.is_file()]
    listed = [
        path.split('/')
        for path in listed
        if path and not re.match(r'\.|data/|.*__pycache__', path)
    ]
    assert {path[0] for path in listed} == {
        *EXPERIMENTS, 'mach', 'tests', 'README.md', 'requirements.txt'
    }
    for name in EXPERIMENTS:
        files = {'README.md', 'checkpoint.py', 'main.py', 'model.py'}
        files |= {'student.py', 'trainer.py'}
        if name in conftest.ASYNCHRONOUS:
            files |= {'link.py', 'processes.py'}
        assert {'/'.join(p[1:]) for p in listed if p[0] == name} == files
        assert all((ROOT / name / file).stat().st_size for file in files)


def test_requirements():
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').split()
    bounds = [re.fullmatch(r'([a-z]+)>=[0-9]+(\.[0-9]+)*', l) for l in lines]
    assert all(bounds), f'lower bounds only: {lines}'
    assert sorted(bound[1] for bound in bounds) == sorted(PACKAGES)


@pytest.mark.parametrize('path', SOURCES)
def test_an_experiment_stands_alone(path):
    siblings = [p.stem for p in (ROOT / path).parent.glob('*.py')]
    assert forbidden_imports(SOURCES[path], siblings) == []


# ------------------------------------------------- what tests the checkers above

ORIGINAL = '''\
"""An original."""

import functools


class Runner:
    """Runs."""

    @property
    def rate(self):
        """Steps a second."""
        return 1


@functools.cache
def double(x):
    """Twice x.

    Args:
        x: a number.
    """
    return 2 * x
'''
MARK_LINE = '# Copied from a/main.py\n'
COPY = ORIGINAL.replace('Runner', 'Walker').replace(
    '    @p', f'    {MARK_LINE}    @p').replace('@f', f'{MARK_LINE}@f')
WHOLE = ORIGINAL.replace('l."""\n', f'l."""\n{MARK_LINE}')


def check(copy):
    """The problems of a copy of the original."""
    return problems_of_marks({'a/main.py': ORIGINAL, 'b/main.py': copy})


@pytest.mark.parametrize('copy, before, after, message', [
    (COPY, '2 * x', '2 + x', 'double, copied from a/main.py, has drifted'),
    (COPY, '@functools.cache\n', '', 'double, copied from a/main.py, has dri'),
    (COPY, 'return 1', 'return 2', 'Walker.rate, copied from a/main.py, has d'),
    (COPY, 'def double', 'def twice', 'has no original of its name'),
    (COPY, 'def rate', 'def double', 'has no original of its name'),
    (COPY, 'from a/main.py', 'from a/gone.py', 'has no such original'),
    (COPY, 'from a/main.py', 'from b/main.py', 'has no such original'),
    (COPY, 'main.py\n@', 'main.py\n\n@', 'b/main.py:16: marks nothing'),
    (COPY, f'{MARK_LINE}@', '# Copied from: a\n@', ':16: marks no'),
    (WHOLE, '2 * x', '2 + x', 'the file, copied from a/main.py, has drifted'),
    (WHOLE, 'return 1\n', 'return 1\n\nMORE = 1\n', 'the file, copied from'),
])
def test_checker_names_what_drifted(copy, before, after, message):
    assert not check(copy)
    found = check(copy.replace(before, after))
    assert found and message in found[0]


def test_repetition_checker():
    unmarked = re.sub(f' *{MARK_LINE}', '', COPY)
    twice = {'a/main.py': ORIGINAL, 'b/main.py': unmarked}
    assert problems_of_repetitions(twice) == [
        'the same, but not marked: a/main.py double, b/main.py double'
    ]
    assert not problems_of_repetitions(twice, lines=9)  # too short
    # Three copies, of which one is marked, are one too few.
    assert problems_of_repetitions({**twice, 'c/main.py': COPY})
    one = {'a/main.py': ORIGINAL}
    for other in ({'b/m.py': COPY}, {'b/m.py': WHOLE}, {'a/m.py': unmarked}):
        assert not problems_of_repetitions(one | other)
    # What is inside of a marked class has the mark of that.
    long = ORIGINAL.replace('return 1', 'a = 1\n        return a')
    marked = re.sub('^(class|@f)', rf'{MARK_LINE}\1', long, flags=re.M)
    assert problems_of_repetitions({'a/main.py': long, 'b/main.py': long})
    assert not problems_of_repetitions({'a/main.py': long, 'b/main.py': marked})


def test_import_checker():
    siblings = ['main', 'model', 'student', 'trainer']
    for line in ('import os, torch.nn', 'from mach import data, metrics',
                 'import mach.data', 'from mach.metrics import f',
                 'import model'):
        assert forbidden_imports(line, siblings) == [], line
    for line, name in (('import link', 'link'), ('import mach', 'mach'),
                       ('from mach import data, main', 'mach.main'),
                       ('def f():\n  import other.model', 'other.model'),
                       ('from . import model', '.'), ('from ..other import m',
                                                      '..other')):
        assert forbidden_imports(line, siblings) == [name], line
