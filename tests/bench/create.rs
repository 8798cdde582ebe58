//! `create`: from the request for a server to its guest's first word, with tap, disk and jail; how long a deletion
//! takes; how many servers eight callers get in a second.
use std::time::{Duration, Instant};

use crate::client::Local;
use crate::ground::Ground;
use crate::host::{Host, id, server};
use crate::rows::{Report, Series};

/// Callers at once.
const CLIENTS: usize = 8;

/// Idle time that lets caches and the host's timers go cold.
const IDLE: Duration = Duration::from_millis(100);

/// After its answer no server says its first word sooner than that: looking for it takes nothing from who makes it.
pub(crate) const NOT_BEFORE: Duration = Duration::from_millis(2);

/// VMMs that the daemon keeps ready where servers are asked for one after the other.
const WARM_SHELLS: usize = 4;

/// Waits for the end of the operation.
const WAIT: Option<&str> = Some("wait=30");

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let (few, each) = (ground.samples(40, 3), ground.samples(10, 1));
    let host = Host::start(ground);
    let (cold, deleted) = cold(&host, few);
    let took = report.add(series("create_ms", "cold"), &cold);
    report.bar(&format!("create_ms cold {took:.1}, at most 10"), took <= 10.0);
    report.add(series("delete_ms", "running"), &deleted);
    let took = report.add(series("create_ms", "after_delete"), &after_delete(&host, few));
    report.bar(&format!("create_ms after_delete {took:.1}, at most 10"), took <= 10.0);
    drop(host);
    let host = Host::start_with(ground, WARM_SHELLS);
    let took = report.add(series("create_ms", "back_to_back"), &back_to_back(&host, few));
    report.bar(&format!("create_ms back_to_back {took:.1}, at most 6"), took <= 6.0);
    let rates: Vec<f64> = (0..ground.samples(3, 1)).map(|round| rate(&host, each, round)).collect();
    let rate = report.add(Series { unit: "1/s", ..series("creates_per_s", "8_clients") }, &rates);
    report.bar(&format!("{rate:.0} creates/s with {CLIENTS} clients, at least 50"), rate >= 50.0);
}

fn series<'a>(bench: &'a str, case: &'a str) -> Series<'a> {
    Series { bench, case, who: "toft", unit: "ms" }
}

/// Milliseconds from the request to the guest's first word, and the server's id.
fn create(host: &Host, client: &mut Local, name: &str) -> (f64, String) {
    let begun = Instant::now();
    let server = id(&client.call("POST", "/v1/servers", None, Some(&server(name))));
    std::thread::sleep(NOT_BEFORE);
    host.first_word(&server);
    (ms(begun), server)
}

fn delete(client: &mut Local, server: &str) -> f64 {
    let begun = Instant::now();
    client.call("DELETE", &format!("/v1/servers/{server}"), WAIT, None);
    ms(begun)
}

fn cold(host: &Host, count: usize) -> (Vec<f64>, Vec<f64>) {
    let mut client = host.local();
    let mut figures = (Vec::new(), Vec::new());
    for at in 0..count {
        std::thread::sleep(IDLE);
        let (took, server) = create(host, &mut client, &format!("cold-{at}"));
        figures.0.push(took);
        std::thread::sleep(IDLE);
        figures.1.push(delete(&mut client, &server));
    }
    figures
}

/// The deletion has been answered as done when the next server is asked for.
fn after_delete(host: &Host, count: usize) -> Vec<f64> {
    let mut client = host.local();
    let mut before = create(host, &mut client, "first").1;
    let mut figures = Vec::new();
    for at in 0..count {
        std::thread::sleep(IDLE);
        delete(&mut client, &before);
        let (took, server) = create(host, &mut client, &format!("next-{at}"));
        figures.push(took);
        before = server;
    }
    delete(&mut client, &before);
    figures
}

fn back_to_back(host: &Host, count: usize) -> Vec<f64> {
    let mut client = host.local();
    // The first start is what a daemon waits for before it keeps any.
    let first = create(host, &mut client, "row").1;
    std::thread::sleep(IDLE);
    let made: Vec<(f64, String)> =
        (0..count).map(|at| create(host, &mut client, &format!("row-{at}"))).collect();
    for server in made.iter().map(|(_, server)| server).chain([&first]) {
        delete(&mut client, server);
    }
    made.into_iter().map(|(took, _)| took).collect()
}

/// Servers that run, each second, when each caller wants so many.
fn rate(host: &Host, each: usize, round: usize) -> f64 {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                let mut connection = host.local();
                for at in 0..each {
                    let body = server(&format!("rate-{round}-{client}-{at}"));
                    let answer = connection.call("POST", "/v1/servers", WAIT, Some(&body));
                    assert_eq!(answer["resource"]["state"], "running", "{answer}");
                }
            });
        }
    });
    (each * CLIENTS) as f64 / begun.elapsed().as_secs_f64()
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}
