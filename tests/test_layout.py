"""What lies where: the folders, their files, and who may import whom."""

import ast
import itertools
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
PACKAGES = ('torch', 'torchvision', 'numpy', 'tqdm')
FILES = {
    name: ['README.md'] + [
        f'{module}.py'
        for module in (['link'] * name.startswith('asynchronous') +
                       ['main', 'model', 'student', 'trainer'])
    ] for name in EXPERIMENTS
}


def list_files():
    """Paths of the repository: what git tracks, or else what is there."""
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
        listed = [
            path.relative_to(ROOT).as_posix() for path in ROOT.glob('*/*')
        ] + [path.name for path in ROOT.iterdir() if path.is_file()]
    return [
        pathlib.PurePosixPath(path)
        for path in listed
        if path and not path.startswith(('.',
                                         'data/')) and '__pycache__' not in path
    ]


def test_top_level():
    top = sorted({path.parts[0] for path in list_files()})
    assert top == sorted(
        [*EXPERIMENTS, 'mach', 'tests', 'README.md', 'requirements.txt'])


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_files_of_an_experiment(experiment):
    files = sorted('/'.join(path.parts[1:])
                   for path in list_files()
                   if path.parts[0] == experiment)
    assert files == FILES[experiment]
    assert all((ROOT / experiment / file).stat().st_size for file in files)


def test_requirements():
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').split()
    bounds = [re.fullmatch(r'([a-z]+)>=[0-9]+(\.[0-9]+)*', l) for l in lines]
    assert all(bounds), f'lower bounds only: {lines}'
    assert sorted(bound[1] for bound in bounds) == sorted(PACKAGES)


def forbidden_imports(source, siblings):
    """What a module of an experiment imports but may not.

    Args:
        source: text of the module.
        siblings: names of the modules in its folder.
    """
    allowed = set(sys.stdlib_module_names) | set(PACKAGES) | set(siblings)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ['.' * node.level + (node.module or '')]
            if names == ['mach']:
                names = [f'mach.{alias.name}' for alias in node.names]
        else:
            continue
        found += [
            name for name in names if name not in
            ('mach.data', 'mach.metrics') and name.split('.')[0] not in allowed
        ]
    return found


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_an_experiment_stands_alone(experiment):
    modules = list((ROOT / experiment).glob('*.py'))
    assert modules
    siblings = [module.stem for module in modules]
    for module in modules:
        text = module.read_text(encoding='utf-8')
        assert not forbidden_imports(text, siblings), module


@pytest.mark.parametrize('line, forbidden', [
    ('import os, torch.nn', []),
    ('from mach import data, metrics', []),
    ('import mach.data', []),
    ('from mach.metrics import accuracy', []),
    ('import model', []),
    ('import link', ['link']),
    ('import mach', ['mach']),
    ('from mach import data, main', ['mach.main']),
    ('from mach.main import plan', ['mach.main']),
    ('from synchronous_single import model', ['synchronous_single']),
    ('def f():\n  import synchronous_single.model',
     ['synchronous_single.model']),
    ('from . import model', ['.']),
    ('from ..synchronous_single import model', ['..synchronous_single']),
    ('import pandas', ['pandas']),
])
def test_import_checker(line, forbidden):
    siblings = ['main', 'model', 'student', 'trainer']
    assert forbidden_imports(line, siblings) == forbidden


def hyperparameters(experiment):
    """Names of the fields of its `class Hyperparameters`, in order."""
    tree = ast.parse((ROOT / experiment / 'main.py').read_bytes())
    return [
        field.target.id for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == 'Hyperparameters'
        for field in node.body if isinstance(field, ast.AnnAssign)
    ]


@pytest.mark.parametrize('one, other',
                         [*itertools.combinations(EXPERIMENTS, 2)])
def test_hyperparameters_come_in_one_order(one, other):
    one, other = hyperparameters(one), hyperparameters(other)
    shared = set(one) & set(other)
    assert {'seed', 'steps', 'learning_rate'} <= shared
    assert ([name for name in one if name in shared
            ] == [name for name in other if name in shared])
