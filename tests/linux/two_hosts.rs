//! A Debian server that moves to another host and back while it works and somebody is logged in. `scripts/lab --hosts 2` runs this on
//! both hosts: all of it happens on the first, and the second does what that one tells it over the wire between them.
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::ssh::{self, Ssh};
use crate::toft::{Daemon, reached, wait_for};

const HOSTS: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
const MOVES_PORT: u16 = 8687;
const ORDERS_PORT: u16 = 8688;

/// The network that both hosts have. Its second wire joins them, and the client lives on it, on no host's network of its own.
const NETWORK: &str = "10.90.0.0/24";
const SERVER: &str = "10.90.0.10";
const CLIENT: &str = "10.90.0.200/24";

/// Longest time until somebody can log in. Two hosts are emulated at once, on a machine that may have other work.
const BOOT: Duration = Duration::from_secs(900);
const MOVE_S: &str = "600";

/// Longest time for an answer of the other host, which may have to bring a server here for it.
const ANSWER: Duration = Duration::from_secs(660);

/// How long the guest may stand still: an emulated host gets little over its wire.
const DOWNTIME_MS: &str = "5000";

/// What the session runs: the guest's two clocks ten times a second, one read between two looks at the other.
const SAMPLER: &str = "python3 -u -c '
import time
n = 0
while True:
    print(n, time.monotonic_ns(), time.time_ns(), time.monotonic_ns(), flush=True)
    n += 1
    time.sleep(0.1)
'";

/// Works until it is enough, and says of each run how it ended. What it works with came from the host, its loader too.
const WORK: &str = "cd stress
while [ ! -e enough ]; do
  lib64/ld-linux-x86-64.so.2 --library-path lib/x86_64-linux-gnu usr/bin/stress-ng --vm 1 --vm-bytes 48m --hdd 1 --hdd-bytes 32m \
    --verify --timeout 30 --temp-path /var/tmp >> log 2>&1
  echo $? >> ended
done
";

/// Samples that show how far the guest's clock is from the client's: one of so many comes without delay.
const ENOUGH: usize = 40;

fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{words:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// This host's wall clock, in nanoseconds.
fn now_ns() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as i128
}

fn seconds(ns: i128) -> f64 {
    ns as f64 / 1e9
}

/// A daemon that other hosts may bring servers to, with the image and the network behind `device`.
fn host(address: &str, device: &str) -> Daemon {
    let daemon = Daemon::start_with(&["--migration-listen", &format!("{address}:{MOVES_PORT}")]);
    daemon.import("debian-12");
    daemon.run(&["--wait", "network", "create", "lan", "--cidr", NETWORK, "--host-device", device]);
    daemon
}

/// The second host, until the first one ends. An order is words of the command line, or none to ask for the time.
fn second() {
    let daemon = host(HOSTS[1], "eth1");
    let listener = TcpListener::bind((HOSTS[1], ORDERS_PORT)).unwrap();
    let (mut orders, _) = listener.accept().unwrap();
    for line in BufReader::new(orders.try_clone().unwrap()).lines() {
        let words: Vec<String> = serde_json::from_str(&line.unwrap()).unwrap();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let answer = match words.first() {
            None => json!(now_ns().to_string()),
            Some(&"date") => json!(run(&words)),
            Some(_) => daemon.json(&words),
        };
        writeln!(orders, "{answer}").unwrap();
    }
}

/// The second host, as the first one sees it.
struct Other {
    orders: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Other {
    fn meet() -> Other {
        let connect = || TcpStream::connect((HOSTS[1], ORDERS_PORT)).ok();
        let orders = wait_for("the other host", Duration::from_secs(240), connect);
        orders.set_nodelay(true).unwrap();
        orders.set_read_timeout(Some(ANSWER)).unwrap();
        let answers = BufReader::new(orders.try_clone().unwrap());
        Other { orders, answers }
    }

    fn order(&mut self, words: &[&str]) -> Value {
        writeln!(self.orders, "{}", json!(words)).unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer of the other host");
        serde_json::from_str(&line).expect("the other host ended")
    }

    /// By how much its wall clock is ahead of this one's, in nanoseconds, as the quickest of some answers tells.
    fn ahead_ns(&mut self) -> i128 {
        let ask = |_| {
            let asked = now_ns();
            let there: i128 = self.order(&[]).as_str().unwrap().parse().unwrap();
            let answered = now_ns();
            (answered - asked, there - (asked + answered) / 2)
        };
        (0..20).map(ask).min().unwrap().1
    }

    /// Sets its clock by this one, as a time server does for hosts that are real.
    fn set_clock(&mut self) {
        let before = self.ahead_ns();
        self.order(&["date", "--set", &format!("{:.6} seconds", seconds(-before))]);
        println!("the hosts' clocks were {:.3} s apart", seconds(before));
    }
}

/// Joins the hosts' second wire, this host's network and the client by a switch.
fn wire_up() {
    let lines = "link add switch type bridge
        link set switch up
        link set eth1 master switch up
        link add lan0 type veth peer name lan0-port
        link set lan0-port master switch up
        netns add client
        link add client0 netns client type veth peer name client0-port
        link set client0-port master switch up
        -n client address add CLIENT dev client0
        -n client link set client0 up";
    for line in lines.lines() {
        let line = line.replace("CLIENT", CLIENT);
        run(&[&["ip"], &line.split_whitespace().collect::<Vec<_>>()[..]].concat());
    }
}

/// What the session said at once, and when it came, by the client's wall clock.
#[derive(Debug, Clone, Copy)]
struct Sample {
    number: u64,
    monotonic_ns: i128,
    wall_ns: i128,
    /// How long the three looks at the clocks took.
    looking_ns: i128,
    came_ns: i128,
}

impl Sample {
    fn parse(line: &str) -> Sample {
        let came_ns = now_ns();
        let numbers: Vec<i128> = line.split(' ').map(|word| word.trim().parse().expect(line)).collect();
        let [number, before, wall_ns, after] = numbers[..] else { panic!("{line}") };
        Sample { number: number as u64, monotonic_ns: before, wall_ns, looking_ns: after - before, came_ns }
    }
}

/// Somebody who is logged in the whole time.
struct Session {
    ssh: Child,
    samples: Arc<Mutex<Vec<Sample>>>,
}

impl Session {
    fn begin(ssh: &Ssh) -> Session {
        let mut command = ssh.command(SAMPLER);
        let mut ssh = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(ssh.stdout.take().unwrap());
        let samples = Arc::new(Mutex::new(Vec::new()));
        let taken = Arc::clone(&samples);
        std::thread::spawn(move || {
            let mut line = String::new();
            // The end of the session may cut its last line.
            while said.read_line(&mut line).is_ok() && line.ends_with('\n') {
                taken.lock().unwrap().push(Sample::parse(&line));
                line.clear();
            }
        });
        Session { ssh, samples }
    }

    fn samples(&self) -> Vec<Sample> {
        self.samples.lock().unwrap().clone()
    }

    /// Waits for samples that come from now on; answers by how much the client's clock is ahead of the guest's, in nanoseconds.
    fn behind_ns(&mut self) -> i128 {
        let told = self.samples().len();
        let fresh = wait_for("the session", Duration::from_secs(120), || {
            let fresh = self.samples().split_off(told);
            (fresh.len() >= ENOUGH).then_some(fresh)
        });
        assert!(self.ssh.try_wait().unwrap().is_none(), "the session ended");
        fresh.iter().map(|sample| sample.came_ns - sample.wall_ns).min().unwrap()
    }

    /// Ends it. It has missed nothing, neither clock of the guest ever went back, and they never went apart.
    fn end(mut self) {
        self.ssh.kill().unwrap();
        self.ssh.wait().unwrap();
        let samples = self.samples();
        let mut longest_ns = 0;
        for (at, pair) in samples.windows(2).enumerate() {
            let [first, next] = [pair[0], pair[1]];
            assert_eq!(next.number, at as u64 + 1, "the session missed something");
            let monotonic_ns = next.monotonic_ns - first.monotonic_ns;
            let wall_ns = next.wall_ns - first.wall_ns;
            assert!(monotonic_ns > 0 && wall_ns > 0, "a clock stepped back: {pair:?}");
            let slack_ns = first.looking_ns + next.looking_ns + 1_000_000;
            assert!((monotonic_ns - wall_ns).abs() <= slack_ns, "a clock stepped: {pair:?}");
            longest_ns = longest_ns.max(monotonic_ns);
        }
        println!("{} samples; the longest gap is {:.3} s", samples.len(), seconds(longest_ns));
    }
}

/// Begins the work, with the program that this host has.
fn begin_work(ssh: &Ssh) {
    let collect =
        "tar -chf - /usr/bin/stress-ng $(ldd /usr/bin/stress-ng | grep -o '/lib[^ ]*') 2> /dev/null";
    let mut tar = Command::new("sh").args(["-c", collect]).stdout(Stdio::piped()).spawn().unwrap();
    let mut unpack = ssh.command("mkdir -p stress && tar -xf - -C stress");
    assert!(unpack.stdin(tar.stdout.take().unwrap()).status().unwrap().success());
    assert!(tar.wait().unwrap().success());
    let begin = format!("echo '{WORK}' > work && (nohup sh work > /dev/null 2>&1 < /dev/null &)");
    ssh.run(&begin).expect("work that begins");
}

/// Every run found everything that it had written, in memory and on the disk.
fn end_work(ssh: &Ssh) {
    ssh.run("touch stress/enough").unwrap();
    let ended = "pgrep -f '[s]h work' > /dev/null || cat stress/ended";
    let ended = wait_for("the end of the work", Duration::from_secs(240), || {
        ssh.run(ended).filter(|text| !text.is_empty())
    });
    let log = ssh.run("cat stress/log").unwrap();
    println!("the work ended {} times", ended.lines().count());
    assert!(ended.lines().all(|line| line.trim() == "0"), "{ended}\n{log}");
    assert!(log.contains("successful run completed"), "{log}");
}

fn first() {
    wire_up();
    let daemon = host(HOSTS[0], "lan0");
    let mut other = Other::meet();
    other.set_clock();
    let apart_ns = other.ahead_ns();
    let (key, public) = ssh::make_key(daemon.scratch());
    let image = daemon.json(&["image", "show", "debian-12"]);
    let target = format!("{}@{SERVER}", image["default_user"].as_str().unwrap());
    // One virtual CPU: an emulated host has two processors, and servers of more of them move in the suites that need no Linux.
    let create = ["--wait", "server", "create", "web1", "--image", "debian-12", "--vcpus", "1"];
    let network = format!("lan={SERVER}");
    let shape = ["--memory", "512M", "--disk", "3G", "--ssh-key-file", &public, "--network", &network];
    let created = daemon.json(&[&create[..], &shape, &["--restart", "never"]].concat());
    let volume = created["volumes"][0]["volume_id"].as_str().unwrap().to_owned();
    let ssh = Ssh { from: &["ip", "netns", "exec", "client"], key, target };
    wait_for("ssh", BOOT, || ssh.run("true"));
    // What a first boot does at its end is not what this is about.
    wait_for("the end of the boot", BOOT, || ssh.run("cloud-init status --wait > /dev/null; echo done"));
    begin_work(&ssh);
    reached("it works");
    let mut session = Session::begin(&ssh);
    let behind_ns = session.behind_ns();

    let migrate = ["--wait", "--wait-timeout-s", MOVE_S, "server", "migrate", "web1"];
    for to in [1, 0] {
        let ticket = ["host", "ticket"];
        let ticket = if to == 1 { other.order(&ticket) } else { daemon.json(&ticket) };
        let ticket = ticket["ticket"].as_str().unwrap().to_owned();
        let address = format!("{}:{MOVES_PORT}", HOSTS[to]);
        let more = ["--target", &address, "--ticket", &ticket, "--downtime-ms", DOWNTIME_MS];
        let order = [&migrate[..], &more].concat();
        let began = Instant::now();
        if to == 1 {
            daemon.json(&order)
        } else {
            other.order(&order)
        };
        let show = ["server", "show", "web1"];
        let server = if to == 1 { other.order(&show) } else { daemon.json(&show) };
        assert_eq!(server["state"], "running", "{server}");
        // The session goes on there. The hosts' own clocks are emulated: they drift apart, and the guest's goes by them.
        let (now_behind_ns, now_apart_ns) = (session.behind_ns(), other.ahead_ns());
        let (moved_ns, drifted_ns) = (now_behind_ns - behind_ns, (now_apart_ns - apart_ns).abs());
        reached(&format!(
            "on host {to} in {:.1} s; the guest's clock is {:.3} s further behind, the hosts' are {:.3} s apart",
            began.elapsed().as_secs_f64(),
            seconds(moved_ns),
            seconds(now_apart_ns)
        ));
        let allowed_ns = 2 * (apart_ns.abs() + drifted_ns) + 300_000_000;
        assert!(moved_ns.abs() <= allowed_ns, "the guest's clock is off by {:.3} s", seconds(moved_ns));
    }
    session.end();
    end_work(&ssh);

    // Its file system is whole, where it ended.
    daemon.run(&["--wait", "server", "stop", "web1", "--grace-s", "180"]);
    assert!(daemon.console("web1").contains("Power down"), "it was forced off");
    let volume = daemon.state().join(format!("volumes/{volume}.raw"));
    run(&["e2fsck", "-f", "-n", volume.to_str().unwrap()]);
}

#[test]
#[ignore = "needs two hosts: scripts/check two-hosts, in the lab"]
fn a_debian_server_at_work_moves_there_and_back() {
    match std::env::var("LAB_HOST").as_deref() {
        Ok("0") => first(),
        Ok("1") => second(),
        _ => panic!("only scripts/lab --hosts 2 may run this"),
    }
}
