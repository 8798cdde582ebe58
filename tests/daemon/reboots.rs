//! The host restarts: every process, device and rule is gone, the files are there, and the numbers of the processes
//! that were are those of strangers. Nothing is adopted by mistake, nobody else is killed, and *wanted* decides.
//! The host is that of the test's namespaces; the kernel's name of this boot is a file mounted over the real one.
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{Orders, Stage, server_body, wait_for, was_killed};
use crate::world::inside;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How often a number is asked for before it is given up: another process may take it in between.
const TRIES: u32 = 50;

/// A process that has nothing to do with Toft.
struct Stranger(Child);

impl Stranger {
    /// One that has the number of a process that was.
    fn with_pid(pid: i32) -> Stranger {
        for _ in 0..TRIES {
            std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).expect("the last number");
            let mut child = Command::new("sleep").arg("600").spawn().expect("sleep can be started");
            if child.id() == pid as u32 {
                return Stranger(child);
            }
            child.kill().and_then(|()| child.wait()).expect("our child");
        }
        panic!("the number {pid} is not to be had");
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().expect("our child").is_none()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // An error means that it has ended, which the test has looked at.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The kernel's name of this boot, which a test can change.
struct BootId(PathBuf);

impl BootId {
    fn mount(path: PathBuf) -> BootId {
        std::fs::copy(BOOT_ID, &path).expect("the name of this boot");
        let mounted = Command::new("mount").arg("--bind").arg(&path).arg(BOOT_ID).status();
        assert!(mounted.expect("mount can be started").success());
        BootId(path)
    }

    fn change(&self) {
        std::fs::write(&self.0, "00000000-0000-4000-8000-000000000001\n").expect("another name");
        assert!(std::fs::read_to_string(BOOT_ID).expect("the name of this boot").starts_with("00000000"));
    }

    fn unmount(self) {
        let unmounted = Command::new("umount").arg(BOOT_ID).status();
        assert!(unmounted.expect("umount can be started").success());
        std::fs::remove_file(self.0).expect("our file");
    }
}

async fn server(stage: &Stage, id: &str) -> Value {
    stage.api().get(&format!("/v1/servers/{id}")).await
}

/// Makes a server that runs, with more in its body than usual.
async fn create(stage: &Stage, name: &str, more: Value) -> String {
    let mut body = server_body(name);
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = stage.call(Method::POST, "/v1/servers", &format!("create-{name}"), Some(body)).await;
    stage.succeeded(&answer.operation()).await.unwrap();
    text(&answer.body["resource"]["id"])
}

async fn act(stage: &Stage, id: &str, action: &str, body: Option<Value>) {
    let path = format!("/v1/servers/{id}/actions/{action}");
    let answer = stage.call(Method::POST, &path, &format!("{action}-{id}"), body).await;
    stage.succeeded(&answer.operation()).await.unwrap();
}

/// Waits until a guest has booted so often, and its server is in this state with nothing to do.
async fn until(stage: &Stage, id: &str, state: &str, boots: usize) -> Value {
    let look = async || {
        let found = server(stage, id).await;
        let (beats, booted) = stage.beats(id).await;
        // One that is paused as soon as it boots may not have come to its first word.
        let said = booted == boots || (state == "paused" && booted + 1 == boots);
        let so = found["state"] == state && found["operation_id"].is_null() && said;
        (so && (beats > 0 || state != "running")).then_some(found)
    };
    let found = wait_for(&format!("{state} after {boots} boots"), look).await;
    match found {
        Ok(found) => found,
        Err(late) => panic!("{late}: {} {:?}", server(stage, id).await, stage.beats(id).await),
    }
}

async fn wanted_decides_after_a_restart() {
    let stage = Stage::new();
    let boot_id = BootId::mount(stage.scratch("boot_id"));
    stage.open_well().await;
    stage.import().await;
    let runs = create(&stage, "runs", json!({})).await;
    // A restart of the host is no failure of the server: what is wanted of it is all that counts.
    let never = create(&stage, "never", json!({ "restart_policy": "never" })).await;
    let parked = create(&stage, "parked", json!({})).await;
    let off = create(&stage, "off", json!({})).await;
    for id in [&runs, &never, &parked, &off] {
        until(&stage, id, "running", 1).await;
    }
    act(&stage, &parked, "pause", None).await;
    act(&stage, &off, "stop", Some(json!({ "grace_s": 0 }))).await;
    let before = stage.look();
    let vmms = stage.vmms();

    // The power goes while a VMM has been started that nobody has recorded, and while a server is stopped.
    stage.kill().await;
    let orders = Orders { die_at: Some("server.spawned:1".to_owned()), ..Orders::default() };
    stage.open(orders).await.expect("nothing is started before it is asked for");
    let late = stage.call(Method::POST, "/v1/servers", "create-late", Some(server_body("late"))).await;
    let died = wait_for("a death", async || stage.ended()).await.unwrap();
    assert!(was_killed(died), "the daemon ended with {died}");
    stage.lose_power().await;
    boot_id.change();
    let mut strangers: Vec<Stranger> = vmms.values().map(|pid| Stranger::with_pid(*pid)).collect();

    stage.open_well().await;
    stage.succeeded(&late.operation()).await.unwrap();
    let late = text(&late.body["resource"]["id"]);
    for (id, state, boots) in [
        (&runs, "running", 2),
        (&never, "running", 2),
        (&parked, "paused", 2),
        (&off, "stopped", 1),
        (&late, "running", 1),
    ] {
        let found = until(&stage, id, state, boots).await;
        assert_eq!(found["wanted"], state, "{found}");
        assert!(found["restart"].is_null(), "a restart of the host counts as a failure: {found}");
    }
    assert!(strangers.iter_mut().all(Stranger::lives), "a stranger was killed for its number");
    drop(strangers);
    assert!(vmms.iter().all(|(name, pid)| stage.vmms().get(name) != Some(pid)), "an old VMM was adopted");
    let deleted = stage.call(Method::DELETE, &format!("/v1/servers/{late}"), "delete-late", None).await;
    stage.succeeded(&deleted.operation()).await.unwrap();
    // Bridges, taps, rules, leases and the DHCP server are what they were.
    stage.same_as(&before).await.unwrap();
    boot_id.unmount();
    stage.close().await;
}

#[test]
fn after_a_restart_of_the_host_nothing_is_adopted_and_wanted_decides() {
    inside(
        "reboots::after_a_restart_of_the_host_nothing_is_adopted_and_wanted_decides",
        wanted_decides_after_a_restart(),
    );
}

async fn a_number_is_not_a_process() {
    let stage = Stage::new();
    stage.open_well().await;
    stage.import().await;
    let (bystander, id) = (stage.create("bystander").await, stage.create("web1").await);
    let vmms = stage.vmms();
    stage.kill().await;
    let killed = Pid::from_raw(vmms["web1"]);
    kill(killed, Signal::SIGKILL).expect("the VMM lives");
    let reaped = async || (!Path::new(&format!("/proc/{killed}")).exists()).then_some(());
    wait_for("its end", reaped).await.unwrap();
    let mut stranger = Stranger::with_pid(vmms["web1"]);

    stage.open_well().await;
    let waiting = wait_for("the loss", async || {
        Some(server(&stage, &id).await).filter(|found| found["state"] == "starting")
    });
    let waiting = waiting.await.unwrap();
    assert_eq!(waiting["state_reason"]["code"], "vmm_vanished", "{waiting}");
    until(&stage, &id, "running", 2).await;
    act(&stage, &id, "stop", Some(json!({ "grace_s": 0 }))).await;
    assert!(stranger.lives(), "a stranger was killed for its number");
    drop(stranger);
    assert_eq!(stage.vmms().get("bystander"), vmms.get("bystander"));
    assert_eq!(stage.beats(&bystander).await.1, 1);
    stage.close().await;
}

#[test]
fn a_stranger_with_the_number_of_a_vmm_is_neither_adopted_nor_killed() {
    inside(
        "reboots::a_stranger_with_the_number_of_a_vmm_is_neither_adopted_nor_killed",
        a_number_is_not_a_process(),
    );
}
