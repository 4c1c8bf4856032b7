"""Tests of mach/data.py. Most use a MNIST of 700 drawn images."""

import functools
import gzip
import hashlib
import http.server
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import zlib

import pytest
import torch
from torch.nn import functional
from torchvision import datasets

import conftest
from mach import data

IMAGES, LABELS = 'train-images-idx3-ubyte', 't10k-labels-idx1-ubyte'
draw_digits = functools.cache(data.draw_digits)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def fixture_safe(tmp_path_factory, monkeypatch, capfd):
    """No test hangs, prints to stdout, draws from torch's generator or litters."""

    def fail(*_):
        raise AssertionError('it hangs')

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    folder = tmp_path_factory.mktemp('temporary')
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    before = torch.random.get_rng_state()
    yield
    signal.alarm(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr().out == '' and not names(folder)


@pytest.fixture(name='offline')
def fixture_offline(monkeypatch):
    """There is no network, and few digits are drawn in place of MNIST."""

    def refuse(*_, **__):
        print('torchvision may print')
        raise socket.gaierror(-3, 'no network in this test')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(data, 'draw_digits', lambda: draw_digits(600, 100))


@pytest.fixture(name='tiny')
def fixture_tiny(monkeypatch):
    """Makes 600 and 100 images count as MNIST: {name: bytes}."""
    contents, resources = {}, []
    for name, part in zip(data.SIZES, draw_digits(600, 100, 1)):
        shape = (len(part), 28, 28) if 'images' in name else (len(part),)
        header = bytes([0, 0, 8, len(shape)])
        header += b''.join(n.to_bytes(4, 'big') for n in shape)
        contents[name] = header + part.to(torch.uint8).numpy().tobytes()
        packed = gzip.compress(contents[name], mtime=0)
        contents[f'{name}.gz'] = packed
        resources.append((f'{name}.gz', hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(data, 'SIZES', {n: len(contents[n]) for n in data.SIZES})
    monkeypatch.setattr(datasets.MNIST, 'resources', resources)
    return contents


@pytest.fixture(name='raw')
def fixture_raw(tmp_path, tiny):
    """The folder of MNIST's files, with the four .gz only."""
    raw = tmp_path / 'data' / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for name, _ in datasets.MNIST.resources:
        (raw / name).write_bytes(tiny[name])
    return raw


@pytest.mark.skipif(not conftest.DATA, reason='no MNIST here')
def test_real_mnist(capfd):
    mnist = data.load(conftest.DATA, strict=True)
    assert mnist.name == 'MNIST' and capfd.readouterr().err == ''
    # Recorded results had these images and held these out.
    for part, n, images_sum, labels_sum in (
        ('train', 55000, 2944557948, 2262446005),
        ('validation', 5000, 2382516298, 1987972355),
        ('test', 10000, 3838467927, 152820446)):
        images = getattr(mnist, f'{part}_images')
        labels = getattr(mnist, f'{part}_labels')
        assert images.shape == (n, 784) and images.dtype == torch.uint8
        assert labels.shape == (n,) and labels.dtype == torch.int64
        assert zlib.crc32(images.numpy()) == images_sum
        assert zlib.crc32(labels.numpy()) == labels_sum
    x = data.normalise(mnist.train_images[::7])
    assert abs(x.mean()) < .01 and abs(x.std() - 1) < .01


def test_gz_alone_are_unpacked(raw, tiny, offline, capfd):
    for _ in range(2):  # from the .gz, then from the unpacked files
        found = list(vars(data.load(raw.parent.parent, 0, True)).values())
        wanted = draw_digits(600, 100, 1)
        assert all(map(torch.equal, wanted, found[1:3] + found[5:]))
        for path in raw.glob('*.gz'):
            path.unlink()
        assert all((raw / name).read_bytes() == tiny[name] for name in names(raw))
    assert len(names(raw)) == 4 and capfd.readouterr().err == ''


def test_folder_that_cannot_be_written(raw, offline, monkeypatch):
    mkdir, before = os.mkdir, names(raw)

    def guarded(path, *args):  # permission bits do not bind root
        if str(path).startswith(str(raw)):
            raise PermissionError(13, 'Permission denied', str(path))
        mkdir(path, *args)

    monkeypatch.setattr(os, 'mkdir', guarded)
    assert data.load(raw.parent.parent, 0, strict=True).name == 'MNIST'
    assert names(raw) == before


@pytest.mark.parametrize('how', ['cut', 'long', 'zeros', 'fifo'])
def test_damaged_file_is_replaced(raw, tiny, offline, capfd, how):
    folder, path, good = raw.parent.parent, raw / IMAGES, tiny[IMAGES]
    data.load(folder, 0, strict=True)
    path.unlink()
    if how == 'fifo':
        os.mkfifo(path)
    else:  # zeros are what a crash of the machine leaves
        path.write_bytes({'cut': good[:-9], 'long': good + b'?'}.get(
            how, bytes(len(good))))
    data.load(folder, 0, strict=True)
    assert f'{path} is damaged' in capfd.readouterr().err
    assert path.read_bytes() == good
    data.load(folder, 0, strict=True)
    assert capfd.readouterr().err == ''


def test_damaged_files_stay_without_network(raw, tiny, offline, capfd):
    packed = raw / f'{LABELS}.gz'
    packed.write_bytes(tiny[packed.name][:-9])
    (raw / LABELS).write_bytes(b'half')
    before = {path: path.read_bytes() for path in raw.iterdir()}
    assert data.load(raw.parent.parent, 0).name == 'drawn-digits'
    lines = capfd.readouterr().err.splitlines()
    assert len([one for one in lines if 'is damaged' in one]) == 2
    assert all(any(str(path) in one for one in lines)
               for path in (packed, raw / LABELS))
    assert {path: path.read_bytes() for path in raw.iterdir()} == before


@pytest.mark.parametrize('start', ['nothing', 'damaged'])
def test_download(tmp_path, raw, tiny, monkeypatch, start):
    asked = set()

    class Mirror(http.server.BaseHTTPRequestHandler):

        def do_GET(self):
            asked.add(self.path[1:])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(tiny[self.path[1:]])

        def log_message(self, *_):
            pass

    wanted = {f'{name}.gz' for name in data.SIZES}
    if start == 'damaged':
        wanted = {f'{IMAGES}.gz'}
        (raw / f'{IMAGES}.gz').write_bytes(b'half')
    else:
        raw = tmp_path / 'new' / 'data' / 'MNIST' / 'raw'
    monkeypatch.setenv('no_proxy', '*')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_server(('127.0.0.1', 0)) as dead:
            ports = dead.getsockname()[1], server.server_port
        monkeypatch.setattr(datasets.MNIST, 'mirrors',
                            [f'http://127.0.0.1:{port}/' for port in ports])
        assert data.load(raw.parent.parent, 0, strict=True).name == 'MNIST'
        server.shutdown()
    assert asked == wanted
    assert all((raw / name).read_bytes() == tiny[name] for name in data.SIZES)


def test_no_network_draws_digits(tmp_path, offline, capfd):
    target = tmp_path / 'new' / 'data'
    dataset = data.load(target, validation=50)
    err = capfd.readouterr().err.replace('torchvision may print\n', '')
    assert len(err.splitlines()) == 1 and 'no network in this test' in err
    for fix in f'{IMAGES}.gz', datasets.MNIST.mirrors[0], str(target):
        assert fix in err
    assert dataset.name == 'drawn-digits' and len(dataset.train_images) == 550
    with pytest.raises(data.DataError, match='no network in this test'):
        data.load(target, strict=True)
    assert not names(tmp_path)  # no empty folder is left


def test_hanging_download_ends_at_the_deadline(tmp_path, monkeypatch):
    release, seen = threading.Event(), []

    def hang(*_, **__):
        seen.append(socket.getdefaulttimeout())
        release.wait(60)
        raise socket.timeout('at last')

    monkeypatch.setattr(socket, 'getaddrinfo', hang)
    monkeypatch.setattr(datasets.MNIST, 'mirrors', ['http://a/', 'http://b/'])
    before, threads = socket.getdefaulttimeout(), set(threading.enumerate())
    start = time.monotonic()
    with pytest.raises(data.DataError, match='no answer within 0.5 s'):
        data.load(tmp_path, strict=True, deadline=.5)
    assert time.monotonic() - start < 30  # of the 60 s that it hangs for
    assert socket.getdefaulttimeout() == before
    release.set()
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)
    assert len(seen) == 1 and 0 < seen[0] < .5  # it tried no other mirror


@pytest.mark.parametrize('owner, name', [(threading.Thread, 'join'),
                                         (shutil, 'copyfile')])
def test_interrupt_leaves_no_half_file(raw, offline, monkeypatch, owner, name):

    def interrupt(_, target=None):
        if target and target.suffix != '.gz':
            target.write_bytes(b'half')
            raise KeyboardInterrupt
        if not target:
            raise KeyboardInterrupt
        return copyfile(_, target)

    copyfile, before = shutil.copyfile, names(raw)
    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load(raw.parent.parent)
    assert names(raw) == before
