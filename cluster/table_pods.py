"""Rule 14: the super pods of a rank table of version 1.2 (CheckSuperPodInfo of HCCL)."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.table_reading import DOCUMENTED, PARA, Entry, Finding, Table, decimal


def pod_rules(table: Table) -> Iterator[Finding]:
    """All that is wrong with the super pods; nothing if the table has none.

    Without super_pod_list HCCL takes an A3 for a plain server.
    """
    if table.values.get("version") != "1.2" or table.pods is None:
        return
    yield from _names(table.pods)
    yield from _members(table)
    yield from _super_device_ids(table)


def _names(pods: tuple[Entry, ...]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for pod in pods:
        name, where = pod.values.get("super_pod_id", ""), f"{pod.where}.super_pod_id"
        if not name:
            text = "expected a string that is not empty, found none; number the super pods"
            yield Finding(14, "EI0014", where, text)
        elif name in seen:
            text = f"expected another one than {seen[name]} has, found “{name}”; number them"
            yield Finding(14, PARA, where, text)
        else:
            seen[name] = pod.where


def _members(table: Table) -> Iterator[Finding]:
    order = [server.values.get("server_id") for server in table.servers]
    pod_of: dict[str, str] = {}
    for pod in table.pods or ():
        for member in pod.parts:
            server_id, where = member.values.get("server_id"), f"{member.where}.server_id"
            if server_id is None:
                continue
            if server_id not in order:
                text = f"expected a server of server_list, found “{server_id}”; correct it"
                yield Finding(14, "EI0014", where, text)
            elif server_id in pod_of:
                text = f"expected a server of no other super pod, found “{server_id}”, which "
                yield Finding(14, PARA, where, f"{text}{pod_of[server_id]} has; list it once")
            else:
                pod_of[server_id] = pod.where
    for server in table.servers:
        server_id = server.values.get("server_id")
        if server_id is not None and server_id not in pod_of:
            text = f"expected “{server_id}” in one super pod, found it in none; add it to one"
            yield Finding(14, PARA, f"{server.where}.server_id", text)
    pods = [pod_of[server_id] for server_id in order if server_id in pod_of]
    changes = [pod for pod, last in zip(pods, [None, *pods], strict=False) if pod != last]
    if len(changes) > len(set(changes)):
        text = "expected the servers of a super pod side by side, found others between them; sort"
        yield Finding(14, DOCUMENTED, "server_list", text + " them by super pod")


def _super_device_ids(table: Table) -> Iterator[Finding]:
    pod_of = {
        member.values.get("server_id"): pod.where
        for pod in table.pods or ()
        for member in pod.parts
    }
    seen: dict[tuple[str, int], str] = {}
    for server in table.servers:
        pod = pod_of.get(server.values.get("server_id"))
        for device in server.parts:
            text, where = device.values.get("super_device_id"), f"{device.where}.super_device_id"
            if text is None:
                message = "expected the SDID, found none; npu-smi info -t spod-info prints it"
                yield Finding(14, PARA, where, message)
            elif not (decimal(text) and int(text) < 2**32 - 1):
                message = f'expected a number below 4294967295, found "{text}"; correct it'
                yield Finding(14, "EI0014", where, message)
            elif pod is not None:
                first = seen.setdefault((pod, int(text)), device.where)
                if first != device.where:
                    message = f"expected another one than {first} has in this super pod, found "
                    yield Finding(14, "EI0014", where, f"{message}{text} again; correct it")
