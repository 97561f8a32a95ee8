import pytest

from vpdeploy_train.data.memory import MEMORY_SHARE, CacheBudget, free_memory


def write(root, **files):
    names = {
        "meminfo": "proc/meminfo",
        "limit": "sys/fs/cgroup/memory.max",
        "used": "sys/fs/cgroup/memory.current",
        "limit1": "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "used1": "sys/fs/cgroup/memory/memory.usage_in_bytes",
    }
    for name, text in files.items():
        path = root / names[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return free_memory(root)


def test_a_budget_is_taken_until_it_is_gone():
    budget = CacheBudget(10)
    assert [budget.take(size) for size in (6, 5, 4, 1)] == [True, False, True, False]
    assert (budget.kept_bytes, budget.free_bytes) == (10, 0)


def test_the_default_budget_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr("vpdeploy_train.data.memory.free_memory", lambda: 1000)
    assert CacheBudget.of_free_memory().limit_bytes == MEMORY_SHARE * 1000


def test_memory_is_free_as_the_system_says(tmp_path):
    assert write(tmp_path, meminfo="MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    5 kB\n") == 5 * 1024


def test_a_containers_limit_counts_where_it_is_less(tmp_path):
    meminfo = "MemAvailable: 5 kB\n"
    assert write(tmp_path, meminfo=meminfo, limit="3000\n", used="1000\n") == 2000
    assert write(tmp_path, meminfo=meminfo, limit="max\n", used="1000\n") == 5 * 1024
    assert write(tmp_path, meminfo=meminfo, limit="9000000\n", used="1000\n") == 5 * 1024


def test_the_older_kind_of_limit_counts_too(tmp_path):
    assert write(tmp_path, meminfo="MemAvailable: 5 kB\n", limit1="2500\n", used1="500\n") == 2000


@pytest.mark.parametrize("text", ["", "nonsense", "MemAvailable:\n", "MemAvailable: x kB\n"])
def test_a_system_that_does_not_tell_is_given_a_fixed_amount(tmp_path, text):
    assert write(tmp_path, meminfo=text) == 2 << 30


def test_a_container_over_its_limit_has_nothing_free(tmp_path):
    assert write(tmp_path, meminfo="MemAvailable: 5 kB\n", limit="100\n", used="200\n") == 0
