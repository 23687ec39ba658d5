"""`polyray serve` as people start it: a process, a Ray and a Serve of its own, over a sweep that really ran."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import grpc
import pytest
from browser import Visits, grave_violations
from sweeps import Command, Finished, command, command_line, descendants
from viewing import Answer, Viewer

import polyray

Row = dict[str, Any]
SECRET = "a-token-of-some-length"


class Service:
    """A running `polyray serve`."""

    def __init__(self, folder: Path, out: Path, *options: object) -> None:
        self.command = Command(folder, "serve", out, "--port", 0, *options)
        self.command.wait_until(lambda: "serving" in self.command.stdout)
        found = re.search(r"at http://(\S+):(\d+)/", self.command.stdout)
        assert found is not None, self.command.stdout
        self.host, self.viewer = found[1], Viewer(int(found[2]))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        return self.command.send(number)


@pytest.fixture(scope="module")
def service(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("serve"), finished.out)
    yield running
    if running.command.process.poll() is None:
        running.end()


@pytest.fixture(scope="module")
def swapped(finished: Finished) -> list[Row]:
    """Rows of `swaps` that paste a patch of the neuron's own into the host's box, with the patch."""
    dataset = polyray.open(finished.out)
    of = {(e["layer"], e["neuron"], e["example"]): e["patch_id"] for e in dataset["examples"].to_table().to_pylist()}
    rows = [
        r | {"patch": of[r["layer"], r["neuron"], r["source_example"]]}
        for r in dataset["swaps"].to_table().to_pylist()
        if r["kind"] == "real" and r["condition"] in ("aligned", "non_aligned") and r["status"] == "ok"
    ]
    assert rows
    return rows


def address(row: Row) -> str:
    asked = {"layer": row["layer"], "neuron": row["neuron"], "patch": row["patch"], "example": row["host_example"]}
    return f"/swap?{urlencode(asked)}"


def figures(page: str) -> list[str]:
    return re.findall(r'<td class="n">([^<]*)</td>', page)


def shown(value: float) -> str:
    return f"{value:,.4f}".replace("-", "−")


def test_it_listens_on_this_machine_alone(service: Service) -> None:
    assert service.host == "127.0.0.1"
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((str(address), service.viewer.port), timeout=10)
    assert service.viewer.get("/", Host="elsewhere:80").status == 421
    assert service.viewer.get("/", "POST").status == 405
    assert service.viewer.get("/..%2f..%2fetc%2fpasswd").status == 404


def test_what_replicas_listen_on_takes_no_commands_from_strangers(service: Service) -> None:
    """Serve's replicas unpickle what reaches their own port: only Ray's token may open it."""
    codes = set()
    for pid in service.command.processes("ServeReplica"):
        for port in listening_ports(pid):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as raised:
                    call(b"", timeout=20)
            codes.add(raised.value.code())
    assert grpc.StatusCode.UNAUTHENTICATED in codes
    assert codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}


def listening_ports(pid: int) -> set[int]:
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
        except OSError:
            continue
        if found:
            inodes.add(found[1])
    lines = [
        line.split() for t in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{t}").read_text().splitlines()[1:]
    ]
    return {int(f[1].rpartition(":")[2], 16) for f in lines if f[3] == "0A" and f[9] in inodes}


def test_a_page_shows_the_numbers_of_the_study(service: Service, swapped: list[Row]) -> None:
    for row in swapped[:: max(1, len(swapped) // 6)]:
        page = service.viewer.page(address(row))
        found = figures(page)
        assert found[3] == shown(row["baseline"])
        assert found[6:8] == [shown(row["response"]), shown(row["response_at_peak"])]
        effect = row["effect_sd"]
        assert found[5] == ("–" if effect is None else f"{effect:+.2f}".replace("-", "−"))


def test_the_rest_of_the_viewer_is_there(service: Service) -> None:
    for path in ("/", "/neurons", "/search?q=red", "/help", "/neurons.csv", "/image?example=0"):
        assert service.viewer.get(path).status == 200, path


def test_ids_that_cannot_be(service: Service, swapped: list[Row]) -> None:
    row = swapped[0]
    for changes, status in (
        ({"patch": 1}, 404), ({"host_example": 300}, 404), ({"patch": "x"}, 400), ({"layer": "../.."}, 404),
        ({"neuron": 10**9}, 404),
    ):  # fmt: skip
        assert service.viewer.get(address(row | changes)).status == status


def test_from_a_neuron_to_an_answer_by_keyboard(service: Service, swapped: list[Row], visit: Visits) -> None:
    row = swapped[0]
    for scripts in (True, False):
        page = visit(
            f"{service.viewer.address}/neuron?layer={row['layer']}&neuron={row['neuron']}", java_script_enabled=scripts
        )
        page.get_by_role("link", name="try a swap").click()
        patches = page.get_by_role("group", name="Patch").get_by_role("radio")
        assert patches.count() >= 2
        patches.first.focus()
        page.keyboard.press("ArrowDown")
        assert patches.nth(1).is_checked()
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Tab")
        page.keyboard.type("7")
        if scripts:
            assert grave_violations(page) == []
        page.keyboard.press("Enter")
        page.wait_for_url("**/swap?**")
        assert page.get_by_role("heading", level=1).inner_text() == "A patch in image 7"
        pictures = page.locator(".tried img")
        texts = [pictures.nth(i).get_attribute("alt") for i in range(pictures.count())]
        whole = [f"image 7 {how}" for how in ("as it is", "with the box filled", "with the patch in the box")]
        assert texts == [*whole, "the patch by itself"]
        if scripts:
            assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
            assert grave_violations(page) == []


def test_a_replica_that_dies_is_replaced(service: Service, swapped: list[Row]) -> None:
    """Whatever was asked meanwhile is answered or may be asked again, by the page's own word."""
    before = service.command.processes("ServeReplica:polyray:model")
    found = asked_while_it_dies(service, before[0], address(swapped[0]))
    assert {a.status for a in found} <= {200, 503}
    assert all("Try again" in a.text for a in found if a.status == 503)
    assert service.viewer.get("/neurons").status == 200
    give_up_s = time.monotonic() + 240
    while (answer := service.viewer.get(address(swapped[0]))).status != 200 and time.monotonic() < give_up_s:
        assert answer.status == 503
        time.sleep(1.0)
    assert figures(answer.text)[6] == shown(swapped[0]["response"])
    after = service.command.processes("ServeReplica:polyray:model")
    assert after
    assert before[0] not in after


def asked_while_it_dies(service: Service, pid: int, path: str) -> list[Answer]:
    found: list[Answer] = []
    is_dead = threading.Event()

    def ask() -> None:
        while not is_dead.is_set():
            found.append(service.viewer.get(path))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    while len(found) < 3:
        time.sleep(0.02)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2.0)
    is_dead.set()
    os.kill(pid, signal.SIGKILL)
    for t in threads:
        t.join(200)
    return found


def test_a_port_that_is_taken_is_refused(service: Service, finished: Finished) -> None:
    refused = command("serve", finished.out, "--port", service.viewer.port)
    assert refused.exit_code == 2, refused.output
    assert f"port {service.viewer.port}" in refused.output
    assert command("serve", finished.out / "nowhere").exit_code == 2


def test_a_signal_ends_it_and_all_that_it_started(service: Service) -> None:
    """Last: the service is gone after it."""
    family = descendants(service.command.process.pid)
    assert len(family) > 5
    service.command.process.terminate()
    assert service.command.wait() == 0
    give_up_s = time.monotonic() + 60
    while (left := [command_line(p) for p in family if command_line(p)]) and time.monotonic() < give_up_s:
        time.sleep(0.2)
    assert left == []
    assert service.command.stdout.splitlines()[1:] == ["ended"]
    assert "Traceback" not in service.command.stderr
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", service.viewer.port, timeout=5).request("GET", "/")


def test_beyond_this_machine_a_token_is_needed_and_what_is_amiss_is_said(
    finished: Finished, tmp_path: Path, swapped: list[Row]
) -> None:
    """On all addresses, over a run whose probe set has gone and whose weights are others."""
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    run = json.loads((out / "run.json").read_text())
    run["config"]["science"]["probe"] = {"kind": "folder", "path": str(tmp_path / "gone")}
    (out / "run.json").write_text(json.dumps(run))
    service = Service(tmp_path / "home", out, "--host", "0.0.0.0")
    made = re.search(r"token, shown this once: (\S+)\n", service.command.stdout)
    assert made is not None
    bearer = {"Authorization": f"Bearer {made[1]}"}
    row = swapped[0]
    try:
        assert service.host == "0.0.0.0"
        for path in ("/", "/neurons", address(row), "/image?example=0"):
            assert service.viewer.get(path).status == 401
            assert service.viewer.get(path, Authorization="Bearer wrong").status == 401
        assert service.viewer.get("/", **bearer).status == 200
        assert service.viewer.get("/", Host="a-name-of-this-machine", **bearer).status == 200
        page = service.viewer.get(f"/neuron?layer={row['layer']}&neuron={row['neuron']}", **bearer)
        assert page.status == 200
        answer = service.viewer.get(address(row), **bearer)
        assert answer.status == 503
        assert "probe.path" in answer.text
        assert "does not exist" in answer.text
        later = service.viewer.get(f"/neuron?layer={row['layer']}&neuron={row['neuron']}", **bearer)
        assert "No swap can be tried." in later.text
        logs = "".join(p.read_text(errors="replace") for p in Path(tmp_path).rglob("*.log"))
        assert made[1] not in logs + service.command.stderr
    finally:
        assert service.end(signal.SIGINT) == 0
