"""What `deploy/` says, against the service: options, metrics, labels, routes, files, users."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra [serve] is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")
import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from mv2v_engine.parser import Parser
from mv2v_engine.serving.command import add_serve
from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.watch.metrics import Metrics
from tests.conftest import save_tiny
from tests.serving.conftest import until
from tests.serving.fake_streams import StreamBackend, stream_record

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "mv2v.json"


def read_yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


@cache
def labels_by_sample() -> dict[str, frozenset[str]]:
    """Every name that /metrics can show, once everything has happened, and its labels."""
    metrics = Metrics(queue_capacity=1, store=ROOT)
    common: dict[str, Any] = {"session": "session_1", "owner": "", "request": {}, "number": 1}
    job = JobRecord(id="job_1", state="running", created=0.0, started=1.0, ended=2.0, **common)
    counters = dict.fromkeys(("hits", "misses", "reloads", "demotions", "evictions"), 1)
    report = {
        "plan": {"tokens_by_kind": {"target": 1}, "merges": []},
        "cache_bytes_by_tier": {"device": 1},
        "cache_counters": counters,
    }
    session = SessionRecord(
        id="session_1",
        owner="",
        kind="views",
        name="",
        checkpoint="tiny-nvs",
        frames=1,
        width=1,
        height=1,
        fps=1.0,
        created=0.0,
        touched=0.0,
        bytes=1,
        num_turns=0,
    )
    metrics.worker_restarted("")
    metrics.session_created(session)
    metrics.job_started(job)
    metrics.job_event(job, {"type": "stage_started", "stage": "vae"})
    metrics.job_event(job, {"type": "stage_done", "stage": "vae"})
    metrics.job_ended(job, report)
    stream = stream_record(state="finished")
    metrics.stream_block(stream, 1, 0.0)
    metrics.stream_ended(stream)
    metrics.observe_request("/", 200, 0.0)
    return {
        sample.name: frozenset(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def shown() -> Iterator[tuple[str, str]]:
    """Every PromQL expression of the dashboard, with its panel."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression of the dashboard and the rules, with where it stands."""
    yield from shown()
    for group in read_yaml("alerts.yml")["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


ALL = list(expressions())


@pytest.mark.parametrize(("place", "expression"), ALL, ids=[place for place, _ in ALL])
def test_every_metric_and_label_exists(place: str, expression: str) -> None:
    known = labels_by_sample()
    bare = re.sub(r'"[^"]*"', '""', expression)
    used = re.findall(r"(mv2v_\w+)(?:\{([^}]*)\})?", bare)
    assert used or bare.startswith("up{")
    grouped = {
        name.strip()
        for names in re.findall(r"(?:by|on) \(([^)]*)\)", bare)
        for name in names.split(",")
    }
    labels: set[str] = set()
    for name, matchers in used:
        assert name in known, f"{place}: no metric {name}"
        labels |= known[name]
        matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert matched <= known[name] | {"instance", "job"}, f"{place}: {name}{{{matchers}}}"
    assert grouped <= labels | {"instance", "le"}, f"{place}: by {grouped}"
    assert bare.count("(") == bare.count(")") and bare.count("{") == bare.count("}")


def selected(selector: str, samples: Sequence[Sample]) -> list[Sample]:
    """Samples that a PromQL selector takes, whatever the instance."""
    name, _, matchers = selector.removesuffix("}").partition("{")
    found = [sample for sample in samples if sample.name == name]
    for label, how, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
        if label == "instance":
            continue
        assert how in ("=", "!="), f"{selector}: teach this test {how}"
        found = [one for one in found if (one.labels[label] == value) == (how == "=")]
    return found


def test_every_panel_has_data_of_services_that_work(
    serving: Callable[..., Any],
    serving_engine: Callable[..., Any],
    upload: Callable[..., dict[str, Any]],
    events_of: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """One makes turns with a worker, one streams; what a panel selects, one of them shows."""
    samples: list[Sample] = []

    def read(client: httpx.Client) -> None:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples.extend(sample for family in families for sample in family.samples)

    checkpoint = save_tiny(tmp_path / "tiny")
    with (
        serving_engine(tmp_path / "turns", checkpoint=str(checkpoint)) as service,
        service.client() as client,
    ):
        until(lambda: client.get("/readyz").status_code == 200)
        path = f"/v1/sessions/{upload(client)['id']}/turns"
        for camera in ("pan_right", "pan_left"):  # the second one remembers
            events_of(client, client.post(path, json={"camera": camera}).json()["id"])
        read(client)
    with serving(tmp_path / "streams", StreamBackend()) as service, service.client() as client:
        stream = client.post("/v1/streams", json={"prompt": "a ball", "blocks": 1}).json()["id"]
        client.get(f"/v1/streams/{stream}/video")  # to its end
        until(lambda: client.get(f"/v1/streams/{stream}").json()["state"] == "finished")
        read(client)
    for panel, expression in shown():
        for selector in re.findall(r"mv2v_\w+(?:\{[^}]*\})?", expression):
            found = selected(selector, samples)
            assert found, f"{panel}: nothing is {selector}"
            is_counted = re.search(r"_(total|count|sum|bucket)$", found[0].name)
            may_be_none = re.search(r'restarts|how="packed"|merged_fraction_sum', selector)
            if is_counted and not may_be_none:
                assert any(sample.value for sample in found), f"{panel}: {selector} is 0"


def test_every_metric_is_on_the_dashboard_or_in_a_rule() -> None:
    shown = " ".join(expression for _, expression in ALL)
    families = {
        re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in labels_by_sample()
    }
    families = {name for name in families if not name.startswith("mv2v_process")}
    assert not {name for name in families if name not in shown}


def test_the_guide_names_every_metric() -> None:
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(mv2v_\w+)`", guide))
    known = labels_by_sample()
    histograms = {name.removesuffix("_bucket") for name in known if name.endswith("_bucket")}
    told = {
        name
        for name in known
        if not re.search(r"_(bucket|sum|count|created)$", name) and "_process_" not in name
    }
    assert named == told | histograms


def test_routes_in_expressions_are_the_applications() -> None:
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    from mv2v_engine.serving.http.routes import jobs, streams

    paths = {route.path for router in (jobs, streams) for route in router.router.routes}
    used = {route for _, text in ALL for route in re.findall(r'route!?="([^"]*)"', text)}
    assert used and used <= paths


def test_rules_say_what_they_mean() -> None:
    (group,) = read_yaml("alerts.yml")["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(names) == len(set(names)) > 5
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


def test_the_dashboard_reads_the_provisioned_source() -> None:
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    users = [*panels, *(target for panel in panels for target in panel["targets"])]
    users += dashboard["templating"]["list"]
    assert {user["datasource"]["uid"] for user in users} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for index, one in enumerate(places):
        for other in places[:index]:
            apart = one["x"] >= other["x"] + other["w"] or other["x"] >= one["x"] + one["w"]
            assert apart or one["y"] >= other["y"] + other["h"] or other["y"] >= one["y"] + one["h"]
    services = read_yaml("docker-compose.yml")["services"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    (provider,) = read_yaml("grafana/provisioning/dashboards/mv2v.yml")["providers"]
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in services["grafana"]["volumes"]}
    assert (DEPLOY / mounts[provider["options"]["path"]]).resolve() == DASHBOARD.parent


def parsed(words: list[str]) -> Any:
    """What the service makes of a container's command; compose's variables at their defaults."""
    parser = Parser()
    add_serve(parser)
    return parser.parse_args([re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words])


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, in order: the word and the rest, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word, rest) for line in joined if line for word, _, rest in [line.partition(" ")]]


def test_the_image_starts_the_service() -> None:
    final = dict(instructions())
    entry = json.loads(final["ENTRYPOINT"])
    assert entry == ["python", "-m", "mv2v_engine.run", "serve"]
    args = parsed(json.loads(final["CMD"]))
    assert str(args.store) == final["VOLUME"] == "/store"
    assert not args.allow_anonymous and args.tokens is None
    assert str(args.port) == final["EXPOSE"]
    assert final["USER"] == "10001:10001"
    assert f"http://127.0.0.1:{args.port}/healthz" in final["HEALTHCHECK"]


def test_the_image_is_built_of_what_there_is() -> None:
    steps = instructions()
    stages = [rest.split(" AS ") for word, rest in steps if word == "FROM"]
    names = [name for _, name in stages]
    assert stages[-1][1] == "serve" and ["build-${VARIANT}", "build"] in stages
    assert {"build-cuda", "build-cpu"} <= set(names)
    assert all("latest" not in base and (":" in base or "$" in base) for base, _ in stages)
    # torch comes in the range that the package asks for
    wanted = re.search(r'"(torch[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    runs = [rest for word, rest in steps if word == "RUN"]
    assert wanted and sum(f'"{wanted[1]}"' in run for run in runs) == 1
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [rest.split()[:-1] for word, rest in steps if word == "COPY" and "--from" not in rest]
    for source in (name for names in copied for name in names):
        assert (ROOT / source).exists() and f"!{source}" in sent
    assert sent[1] == "*"


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_compose_starts_the_service(name: str) -> None:
    compose = read_yaml("docker-compose.yml")
    service = compose["services"][name]
    args = parsed(service["command"])
    secrets = {f"/run/secrets/{secret}" for secret in service["secrets"]}
    assert str(args.tokens) in secrets and set(service["secrets"]) <= set(compose["secrets"])
    assert args.grace < int(service["stop_grace_period"].removesuffix("s"))
    assert service["profiles"] == [name] and ("deploy" in service) == (name == "gpu")
    assert service["build"]["args"] == {"VARIANT": "cuda" if name == "gpu" else "cpu"}
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert f"store:{args.store}" in service["volumes"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    (port,) = service["ports"]
    assert port.endswith(f":{args.port}")
    # where Prometheus looks for it
    (target,) = read_yaml("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"{service['networks']['default']['aliases'][0]}:{args.port}"


def test_compose_opens_nothing_and_holds_no_secret() -> None:
    compose = read_yaml("docker-compose.yml")
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert ":latest" not in service["image"] and ":" in service["image"]
        for variable, value in service.get("environment", {}).items():
            is_secret = re.search(r"PASSWORD|TOKEN|SECRET|KEY", variable)
            assert not is_secret or value.startswith("/run/secrets/"), variable
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            elif "$" not in source:
                assert source in compose["volumes"]
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "/deploy/secrets/" in ignored
    for secret in compose["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    (rules,) = read_yaml("prometheus.yml")["rule_files"]
    mounts = compose["services"]["prometheus"]["volumes"]
    assert f"./{rules}:/etc/prometheus/{rules}:ro" in mounts


def test_the_healthcheck_is_a_program() -> None:
    command = json.loads(dict(instructions())["HEALTHCHECK"].split("CMD ", 1)[1])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "healthcheck", "exec")
