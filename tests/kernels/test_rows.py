"""The CPU paths' threads: every row once, no waiting for a thread that has not begun, errors arrive."""

import multiprocessing
import threading

import pytest
import torch

rows_cpu = pytest.importorskip("dist_reg_kernels.rows_cpu")
ROWS, COLUMNS = 1000, rows_cpu.ELEMENTS_PER_THREAD


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def count(rows):
    seen = [0] * rows

    def function(begin, end):
        for r in range(begin, end):
            seen[r] += 1

    rows_cpu.for_rows(function, rows, COLUMNS, ())
    return seen


@pytest.mark.parametrize("rows", [1, 2, 7, ROWS])
def test_every_row_is_done_once(rows):
    for _ in range(20):
        assert count(rows) == [1] * rows


def test_little_work_stays_on_this_thread():
    names = set()
    rows_cpu.for_rows(lambda *_: names.add(threading.current_thread().name), ROWS, 1, ())
    assert names == {threading.current_thread().name}


def test_the_other_threads_take_their_share():
    together = threading.Barrier(3, timeout=60)
    met = threading.local()

    def function(begin, end):
        if not hasattr(met, "done"):  # the first piece of each thread
            met.done = together.wait()

    rows_cpu.for_rows(function, ROWS, COLUMNS, ())


def test_a_busy_thread_is_not_waited_for():
    free, busy = threading.Event(), threading.Barrier(3, timeout=60)
    for _ in range(2):
        rows_cpu._helpers(2).put(lambda: (busy.wait(), free.wait(60)))
    busy.wait()
    assert count(ROWS) == [1] * ROWS
    free.set()
    assert count(ROWS) == [1] * ROWS


def test_an_error_of_another_thread_is_raised_here_and_the_thread_goes_on():
    together = threading.Barrier(2, timeout=60)
    here, waited = threading.current_thread(), []

    def function(begin, end):
        if threading.current_thread() is not here:
            together.wait()
            raise RuntimeError("of another thread")
        if not waited:
            waited.append(together.wait())

    torch.set_num_threads(2)
    for _ in range(3):
        waited.clear()
        with pytest.raises(RuntimeError, match="of another thread"):
            rows_cpu.for_rows(function, ROWS, COLUMNS, ())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    assert count(ROWS) == [1] * ROWS
    child = multiprocessing.get_context("fork").Process(target=_in_the_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _in_the_child():
    together = threading.Barrier(2, timeout=30)
    rows_cpu._helpers(1).put(together.wait)
    together.wait()
    assert count(ROWS) == [1] * ROWS
