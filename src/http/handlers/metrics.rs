//! `/metrics`: the host's and its machines' figures as Prometheus reads them (text exposition format 0.0.4).
use std::fmt::Write;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use model::host::{CheckStatus, HostReport};
use model::page::ListQuery;
use model::server::{Server, ServerMetrics, ServerState};

use crate::error::Failure;
use crate::limits::{METRICS_AT_ONCE, METRICS_SERVERS_MAX, METRICS_WAIT_MAX};
use crate::query::{NoParameters, Query};
use crate::routes::Api;

/// Figures of the host and of every running server, for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "host", operation_id = "scrape_metrics",
    responses((status = 200, description = "Text exposition format 0.0.4.", body = String,
        content_type = "text/plain")))]
pub(crate) async fn scrape(State(api): State<Api>, _: Query<NoParameters>) -> Result<Response, Failure> {
    let report = api.host.report().await?;
    let servers = running(&api).await?;
    let measured: Vec<(Server, ServerMetrics)> = stream::iter(servers)
        .map(|server| measure(&api, server))
        .buffer_unordered(METRICS_AT_ONCE)
        .filter_map(|measured| async { measured })
        .collect()
        .await;
    let mut page = Exposition::default();
    host_figures(&mut page, &report);
    server_figures(&mut page, &measured);
    let mut response = page.0.into_response();
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    Ok(response)
}

async fn running(api: &Api) -> Result<Vec<Server>, Failure> {
    let mut servers: Vec<Server> = Vec::new();
    let mut cursor = None;
    loop {
        let limit = Some(model::limits::PAGE_ITEMS_MAX);
        let page = api.host.servers().list(ListQuery { limit, cursor, ..ListQuery::default() }).await?;
        let runs = |server: &Server| matches!(server.state, ServerState::Running | ServerState::Paused);
        servers.extend(page.items.into_iter().filter(runs));
        cursor = page.next_cursor;
        if cursor.is_none() || servers.len() >= METRICS_SERVERS_MAX {
            servers.truncate(METRICS_SERVERS_MAX);
            return Ok(servers);
        }
    }
}

/// A machine's counters; `None` when it ended or does not answer in time.
async fn measure(api: &Api, server: Server) -> Option<(Server, ServerMetrics)> {
    let asked = api.host.servers().metrics(server.id);
    let metrics = tokio::time::timeout(METRICS_WAIT_MAX, asked).await.ok()?.ok()?;
    Some((server, metrics))
}

/// A page of figures; those of one name stand together, as the format wants.
#[derive(Default)]
struct Exposition(String);

impl Exposition {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// One figure. `labels` is written as `key="value"` pairs; values are names, ids and words of ours, which hold
    /// no quotes.
    fn figure(&mut self, name: &str, labels: &str, value: u64) {
        let _ = if labels.is_empty() {
            writeln!(self.0, "{name} {value}")
        } else {
            writeln!(self.0, "{name}{{{labels}}} {value}")
        };
    }
}

fn host_figures(page: &mut Exposition, report: &HostReport) {
    page.family("toft_servers", "gauge", "Servers by state.");
    for (state, count) in &report.servers {
        page.figure("toft_servers", &format!("state=\"{state}\""), u64::from(*count));
    }
    page.family("toft_host_cpus", "gauge", "Logical CPUs of the host, and virtual CPUs of running servers.");
    page.figure("toft_host_cpus", "kind=\"total\"", u64::from(report.cpus.total));
    page.figure("toft_host_cpus", "kind=\"used\"", u64::from(report.cpus.used));
    for (name, help, capacity) in [
        ("toft_host_memory_bytes", "Memory of the host.", &report.memory),
        ("toft_host_storage_bytes", "Space for volumes and images.", &report.storage),
    ] {
        page.family(name, "gauge", help);
        page.figure(name, "kind=\"total\"", capacity.total_bytes);
        page.figure(name, "kind=\"used\"", capacity.used_bytes);
        page.figure(name, "kind=\"free\"", capacity.free_bytes);
    }
    page.family("toft_host_check_ok", "gauge", "1 when the check is good.");
    for check in &report.checks {
        let good = u64::from(check.status == CheckStatus::Ok);
        page.figure("toft_host_check_ok", &format!("check=\"{}\"", check.name), good);
    }
}

/// A counter of a machine: its name, what it counts, and where it is.
type Counter = (&'static str, &'static str, fn(&ServerMetrics) -> Vec<(String, u64)>);

fn server_figures(page: &mut Exposition, measured: &[(Server, ServerMetrics)]) {
    let owed = "toft_server_memory_owed_bytes";
    page.family(owed, "gauge", "Memory that the host which the server has moved from still has.");
    for (server, metrics) in measured {
        let labels = format!("id=\"{}\",name=\"{}\"", server.id, server.name);
        if let Some(bytes) = metrics.memory_owed_bytes {
            page.figure(owed, &labels, bytes);
        }
    }
    let counters: &[Counter] = &[
        ("toft_server_running_ms_total", "Time its vCPUs were allowed to run.", |m| plain(m.running_ms)),
        ("toft_server_resets_total", "Resets.", |m| plain(m.resets)),
        ("toft_server_device_faults_total", "Protocol errors of the guest.", |m| plain(m.device_faults)),
        ("toft_server_vcpu_cpu_ms_total", "CPU time of each vCPU.", |m| each("vcpu", &m.vcpu_cpu_ms, |v| *v)),
        ("toft_server_vcpu_exits_total", "Exits of each vCPU.", |m| each("vcpu", &m.vcpu_exits, |v| *v)),
        ("toft_server_disk_read_bytes_total", "Bytes read.", |m| each("disk", &m.disks, |d| d.read_bytes)),
        ("toft_server_disk_written_bytes_total", "Bytes written.", |m| {
            each("disk", &m.disks, |d| d.written_bytes)
        }),
        ("toft_server_disk_reads_total", "Read requests.", |m| each("disk", &m.disks, |d| d.reads)),
        ("toft_server_disk_writes_total", "Write requests.", |m| each("disk", &m.disks, |d| d.writes)),
        ("toft_server_disk_errors_total", "Failed requests.", |m| each("disk", &m.disks, |d| d.errors)),
        ("toft_server_nic_rx_bytes_total", "Bytes received.", |m| each("nic", &m.nics, |n| n.rx_bytes)),
        ("toft_server_nic_tx_bytes_total", "Bytes sent.", |m| each("nic", &m.nics, |n| n.tx_bytes)),
        ("toft_server_nic_rx_packets_total", "Packets received.", |m| each("nic", &m.nics, |n| n.rx_packets)),
        ("toft_server_nic_tx_packets_total", "Packets sent.", |m| each("nic", &m.nics, |n| n.tx_packets)),
        ("toft_server_nic_rx_dropped_total", "Packets dropped on the way in.", |m| {
            each("nic", &m.nics, |n| n.rx_dropped)
        }),
    ];
    for (name, help, read) in counters {
        page.family(name, "counter", help);
        for (server, metrics) in measured {
            for (label, value) in read(metrics) {
                page.figure(name, &format!("id=\"{}\",name=\"{}\"{label}", server.id, server.name), value);
            }
        }
    }
    page.family("toft_server_memory_resident_bytes", "gauge", "Memory of the VMM with the guest's.");
    for (server, metrics) in measured {
        let labels = format!("id=\"{}\",name=\"{}\"", server.id, server.name);
        page.figure("toft_server_memory_resident_bytes", &labels, metrics.memory_resident_bytes);
    }
}

fn plain(value: u64) -> Vec<(String, u64)> {
    vec![(String::new(), value)]
}

fn each<T>(kind: &str, items: &[T], read: impl Fn(&T) -> u64) -> Vec<(String, u64)> {
    items.iter().enumerate().map(|(index, item)| (format!(",{kind}=\"{index}\""), read(item))).collect()
}
