"""The layout of the repository, and copies that agree with their originals.

`# Copied from <path>` names the file of the original. Above a function, class or
method it marks a copy of the object of that name. Below a module's docstring it
marks a copy of the whole file.
"""

import ast
import contextlib
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
MARKED_FROM = 6  # lines; shorter repetitions need no mark
MARK = re.compile(r'[ \t]*# Copied from (\S+)[ \t]*')
FILES = 'README.md checkpoint.py main.py model.py student.py trainer.py'.split()
MESSAGES = ['exchange.py', 'link.py', 'processes.py']  # if asynchronous
SOURCES = {
    f'{name}/{path.name}': path.read_text(encoding='utf-8')
    for name in EXPERIMENTS for path in sorted((ROOT / name).glob('*.py'))
}


def plain(lines):
    """The text of lines without marks, indentation and repeated blank lines."""
    text = '\n'.join(line for line in lines if not MARK.fullmatch(line))
    return textwrap.dedent(re.sub(r'\n{2,}', '\n\n', text)).strip()


def read(source):
    """The definitions of a module, its marks and its misplaced marks.

    Returns:
        Qualified name -> text of each definition, with its decorators; '' -> the
        whole file. Qualified name -> path of the original. Numbers of lines.
    """
    lines, tree = source.splitlines(), ast.parse(source)
    texts, marks, stray = {'': plain(lines)}, {}, []
    above = {tree.body[0].end_lineno + 1: ''}  # below the docstring
    places = [(tree, '')]
    for node, prefix in places:  # it grows in the loop
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f'{prefix}.{child.name}'.lstrip('.')
                first = min(n.lineno for n in (child, *child.decorator_list))
                texts[name] = plain(lines[first - 1:child.end_lineno])
                above[first - 1] = name
            places.append((child, name))
    for number, line in enumerate(lines, start=1):
        mark = MARK.fullmatch(line)
        if mark and number in above:
            marks[above[number]] = mark[1]
        elif 'copied from' in line.lower():
            stray.append(number)
    return texts, marks, stray


def problems(sources):
    """What is wrong with the copies in `sources`, path -> text of the file."""
    modules = {path: read(text) for path, text in sources.items()}
    found, unmarked = [], {}
    for path, (texts, marks, stray) in modules.items():
        found += [f'{path}:{number}: marks nothing' for number in stray]
        for name, origin in marks.items():
            originals = modules[origin][0] if origin in modules else {}
            if origin == path or name not in originals:
                found.append(f'{path}: {name} has no original')
            elif texts[name] != originals[name]:
                found.append(f'{path}: {name} has drifted')
        for name, text in texts.items():
            # The mark of a class or a file covers all that is in it.
            owners = itertools.accumulate(name.split('.'), '{}.{}'.format)
            if marks.keys().isdisjoint(['', *owners]):
                last = name.rpartition('.')[2]
                unmarked.setdefault((last, text), set()).add(path)
    for (name, text), paths in unmarked.items():
        folders = {path.split('/')[0] for path in paths}
        if len(folders) > 1 and text.count('\n') + 1 >= MARKED_FROM:
            found.append(f'{name}: the same without a mark in {folders}')
    return found


def test_copies_agree_and_repetitions_are_marked():
    assert problems(SOURCES) == []
    assert sum(len(read(text)[1]) for text in SOURCES.values()) > 20


@pytest.mark.parametrize('file, before, after, problem', [
    ('main.py', 'queue.Queue(4)', 'queue.Queue(5)', 'train has drifted'),
    ('main.py', '@torch.inference_mode()\n', '', 'evaluate has drifted'),
    ('main.py', 'def say_eval', 'def tell_eval', 'tell_eval has no original'),
    ('main.py', 'from synchronous_single', 'from single', 'has no original'),
    ('main.py', 'main.py\ndef', 'main.py\n\ndef', 'marks nothing'),
    ('main.py', '# Copied from', '# From', 'read: the same without a mark'),
    ('model.py', 'hidden // 2', 'hidden // 3', ' has drifted'),
    ('model.py', '# Copied from', '# From', 'Mach: the same without a mark'),
])
def test_a_change_of_a_copy_is_found(file, before, after, problem):
    path = f'synchronous_kgraph/{file}'
    changed = SOURCES[path].replace(before, after)
    assert problem in str(problems(SOURCES | {path: changed}))


def test_these_files_are_copies():
    whole = {path: read(text)[1].get('') for path, text in SOURCES.items()}
    for name in EXPERIMENTS[1:]:
        for file in 'checkpoint.py', 'model.py':
            assert whole[f'{name}/{file}'] == f'synchronous_single/{file}'
    # The student of synchronous_single is another one: it mimics its MACH.
    for name in EXPERIMENTS[2:]:
        origin = 'synchronous_sequence/student.py'
        assert whole[f'{name}/student.py'] == origin
    one, other, *_ = (
        read(SOURCES[f'{name}/student.py'])[0] for name in EXPERIMENTS)
    assert one['Student'] != other['Student']
    for file in MESSAGES:
        origin = f'asynchronous_sequence/{file}'
        assert whole[f'asynchronous_kgraph/{file}'] == origin


def test_every_main_has_the_same_skeleton():
    orders = []
    for name in EXPERIMENTS:
        text = SOURCES[f'{name}/main.py']
        sections = ' '.join(re.findall('^# -+ (.+)', text, re.M))
        assert sections == 'hyperparameters MACHs threads evaluation summary'
        orders.append(re.findall(r'^    (\w+): \w+ = hparam\(', text, re.M))
    for one, other in itertools.permutations(orders, 2):
        shared = [name for name in one if name in other]
        assert {'seed', 'steps', 'learning_rate'} <= set(shared)
        assert shared == [name for name in other if name in one]


# ---------------------------------------------------------------------- layout


def test_layout():
    listed = []
    with contextlib.suppress(OSError):  # there is no git
        listed = subprocess.run(['git', 'ls-files'],
                                cwd=ROOT,
                                capture_output=True,
                                check=False,
                                text=True).stdout.splitlines()
    if 'requirements.txt' not in listed:  # an unpacked archive
        paths = [*ROOT.glob('*/*'), *ROOT.glob('*.*')]
        listed = [str(path.relative_to(ROOT)) for path in paths]
    listed = [p for p in listed if not re.match(r'\.|data/|.*__pycache__', p)]
    expected = {*EXPERIMENTS, 'mach', 'tests', 'README.md', 'requirements.txt'}
    assert {path.split('/')[0] for path in listed} == expected
    for name in EXPERIMENTS:
        files = FILES + MESSAGES * (name in conftest.ASYNCHRONOUS)
        expected = {f'{name}/{file}' for file in files}
        assert {p for p in listed if p.startswith(f'{name}/')} == expected
        assert all((ROOT / path).stat().st_size for path in expected)


def test_requirements_are_four_packages_with_lower_bounds():
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').split()
    bounds = [re.fullmatch(r'([a-z]+)>=[0-9.]+', line) for line in lines]
    assert all(bounds), lines
    assert sorted(bound[1] for bound in bounds) == sorted(PACKAGES)


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_an_experiment_imports_its_folder_mach_and_the_packages(experiment):
    allowed = {path.stem for path in (ROOT / experiment).glob('*.py')}
    allowed |= {*sys.stdlib_module_names, *PACKAGES}
    for path in (ROOT / experiment).glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names, prefix = getattr(node, 'names', []), ''
            if isinstance(node, ast.ImportFrom):
                prefix = '.' * node.level + (node.module or '') + '.'
            elif not isinstance(node, ast.Import):
                continue
            imported = {prefix + alias.name for alias in names}
            imported -= {'mach.data', 'mach.metrics'}
            assert {name.split('.')[0] for name in imported} <= allowed, path
