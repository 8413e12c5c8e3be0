"""How much memory can be had."""

from __future__ import annotations

import pytest

from adapt_pruner.engines.device import _left_in_groups

GB = 10**9
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(("listed", "files"), [("0::/a/b\n", V2), ("5:cpu:/x\n9:memory:/a/b\n", V1)])
def test_limits_of_all_groups_around_a_process_count(tmp_path, listed, files):
    top, limit, used, droppable = files
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(listed)
    for group, bytes_of_limit in (("a/b", "max"), ("a", str(16 * GB))):
        place = tmp_path / top / group
        place.mkdir(parents=True, exist_ok=True)
        (place / limit).write_text(f"{bytes_of_limit}\n")
        (place / used).write_text(f"{10 * GB}\n")
        (place / "memory.stat").write_text(f"anon 1\n{droppable} {7 * GB}\n")
    assert list(_left_in_groups(tmp_path)) == [13 * GB]


def test_no_groups(tmp_path):
    assert list(_left_in_groups(tmp_path)) == []
