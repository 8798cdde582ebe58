//! The daemon is held at the points that a crash could follow, one after the other, and what it works with dies there:
//! its launcher, or the VMM that the call is about. Then the daemon goes on. The call ends, done or with a reason, the
//! server comes to what is wanted of it, nothing is left over, and no other server is touched.
//! Some points of each call in a normal run, all with `TOFT_LONG=1`.
use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Instant;

use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::api::text;
use crate::daemon::{LOOK_AGAIN, Orders, wait_for};
use crate::sweep::AFTERWARDS;
use crate::sweep::call::{SUBJECT, Sweep, Verb};
use crate::world::{inside, processes};

/// Points tried with each victim in a normal run.
const SAMPLE: usize = 10;

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Launcher,
    Vmm,
}

/// How one point came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Met {
    /// The victim died there.
    Struck,
    /// The daemon was held, and there was no such process.
    Nobody,
    /// The daemon did not get there.
    NotReached,
}

impl Sweep {
    async fn strike(&self, victim: Victim) -> Met {
        let pid = match victim {
            Victim::Launcher => self.stage.launcher(),
            Victim::Vmm => self.stage.vmms().get(SUBJECT).copied(),
        };
        let Some(pid) = pid else { return Met::Nobody };
        if kill(Pid::from_raw(pid), Signal::SIGKILL).is_err() {
            // It has just ended by itself.
            return Met::Nobody;
        }
        let gone = async || processes().iter().all(|(other, _)| *other != pid).then_some(());
        wait_for("the victim's end", gone).await.unwrap();
        Met::Struck
    }

    /// Strikes when the daemon is held, and lets it go on. Ends when `over` is set.
    async fn lie_in_wait(&self, victim: Victim, over: &Cell<bool>) -> Met {
        while !over.get() {
            if self.stage.is_held() {
                let met = self.strike(victim).await;
                self.stage.release();
                return met;
            }
            tokio::time::sleep(LOOK_AGAIN / 10).await;
        }
        Met::NotReached
    }

    /// One death of a victim, with the daemon at a point.
    async fn struck_at(&mut self, point: &str, victim: Victim) -> Result<(Met, &'static str), String> {
        self.prepare().await;
        let (beats_before, _) = self.stage.beats(&self.bystander).await;
        self.stage.kill().await;
        let key = self.key("held");
        let (over, struck) = (Cell::new(false), Cell::new(false));
        let calling = async {
            let orders = Orders { hold_at: Some(point.to_owned()), ..Orders::default() };
            self.stage.open(orders).await.map_err(|status| format!("the daemon ended with {status}"))?;
            let (operation, _) = self.call(&key).await?.ok_or("the daemon died")?;
            self.stage.finished(&operation).await
        };
        let calling = async {
            let ended = calling.await;
            // The point may follow the end of the operation by a little.
            let end = Instant::now() + AFTERWARDS;
            while !struck.get() && Instant::now() < end {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            over.set(true);
            ended
        };
        let striking = async {
            let met = self.lie_in_wait(victim, &over).await;
            struck.set(true);
            met
        };
        let (ended, met) = tokio::join!(calling, striking);
        let state = match ended {
            Ok(ended) if ended["state"] == "succeeded" => "succeeded",
            Ok(ended) if met == Met::Struck && ended["error"]["code"] == "machine_failed" => "failed",
            // Its VMM died before the call came.
            Err(why) if met == Met::Struck && victim == Victim::Vmm && why.contains("wrong_state") => {
                "refused"
            }
            ended => return Err(format!("{met:?}, and it ended with {ended:?}")),
        };
        if met == Met::NotReached {
            // It may get there later, when nobody would let it go on.
            self.stage.kill().await;
            self.stage.open_well().await;
        }
        self.comes_to_rest().await?;
        self.back_to_rest().await;
        self.stage.same_as(&self.rest).await?;
        self.bystander_is_well(beats_before).await?;
        Ok((met, state))
    }

    /// Waits until the subject is what is wanted of it. Where its policy lets it wait, its reason is looked at, and it
    /// is started at once.
    async fn comes_to_rest(&mut self) -> Result<(), String> {
        let mut last = Value::Null;
        let mut restarts = 0;
        let end = wait_for("rest", async || {
            let Some(server) = self.server().await else { return Some(Ok(())) };
            let runs = self.stage.vmms().contains_key(SUBJECT);
            let (state, wanted) = (text(&server["state"]), text(&server["wanted"]));
            let is_off = matches!(state.as_str(), "stopped" | "hibernated");
            if state == wanted && server["operation_id"].is_null() && runs != is_off {
                return Some(Ok(()));
            }
            if state == "failed" {
                return Some(Err(format!("its policy does not let it stay failed: {server}")));
            }
            if state == "starting" && !server["restart"]["at"].is_null() && restarts == 0 {
                restarts += 1;
                let reason = text(&server["state_reason"]["code"]);
                if !["vmm_killed", "vmm_vanished", "machine_failed"].contains(&reason.as_str()) {
                    return Some(Err(format!("nobody would know why: {server}")));
                }
                let path = format!("/v1/servers/{}/actions/start", text(&server["id"]));
                let key = format!("at-once-{}-{}", server["id"], server["generation"]);
                self.stage.call(Method::POST, &path, &key, None).await;
            }
            last = server;
            None
        });
        end.await.map_err(|late| format!("{late}: {last}"))?
    }

    /// From wherever a call has ended to where the next begins.
    async fn back_to_rest(&mut self) {
        let state = self.server().await.map(|server| text(&server["state"]));
        match (self.verb, state.as_deref()) {
            (Verb::Create | Verb::Clone | Verb::Delete, None) => self.forget_subject(),
            (Verb::Pause, Some("running")) | (Verb::Resume, Some("running")) => {}
            (Verb::Resume, Some("paused")) => self.act("resume", 0).await,
            // Its VMM died on the way back: its disks are those of the snapshot, whose memory is kept for a start.
            (Verb::Restore, Some("hibernated")) => self.act("start", 0).await,
            _ => self.tidy().await,
        }
    }
}

/// The points at which there may be a victim.
fn points_with(victim: Victim, verb: Verb, points: &[String]) -> &[String] {
    // A daemon starts its launcher with its first VMM.
    let spawned = points.iter().position(|point| point == "server.spawned:1");
    match (victim, verb) {
        (Victim::Launcher, _) | (_, Verb::Create | Verb::Clone | Verb::Start) => {
            &points[spawned.unwrap_or(points.len())..]
        }
        _ => points,
    }
}

async fn struck_everywhere(verb: Verb) {
    let begun = Instant::now();
    let mut sweep = Sweep::new(verb).await;
    let points = sweep.count().await;
    let is_long = std::env::var_os("TOFT_LONG").is_some();
    let mut ends: BTreeMap<(Victim, Met, &str), u32> = BTreeMap::new();
    for victim in [Victim::Launcher, Victim::Vmm] {
        let points = points_with(victim, verb, &points);
        let step = if is_long { 1 } else { points.len().div_ceil(SAMPLE).max(1) };
        for point in points.iter().skip(step / 2).step_by(step) {
            match sweep.struck_at(point, victim).await {
                Ok((met, end)) => *ends.entry((victim, met, end)).or_default() += 1,
                Err(why) => panic!("{verb:?}, {victim:?} at {point} of {points:?}: {why}"),
            }
        }
    }
    println!("{verb:?}: {} points, {ends:?}, {:.1} s", points.len(), begun.elapsed().as_secs_f64());
    assert!(ends.keys().any(|(_, met, _)| *met == Met::Struck), "nobody was struck");
    sweep.stage.close().await;
}

#[test]
fn a_create_ends_whoever_dies_meanwhile() {
    inside("held::a_create_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Create));
}

#[test]
fn a_start_ends_whoever_dies_meanwhile() {
    inside("held::a_start_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Start));
}

#[test]
fn a_stop_ends_whoever_dies_meanwhile() {
    inside("held::a_stop_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Stop));
}

#[test]
fn a_reboot_ends_whoever_dies_meanwhile() {
    inside("held::a_reboot_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Reboot));
}

#[test]
fn a_reset_ends_whoever_dies_meanwhile() {
    inside("held::a_reset_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Reset));
}

#[test]
fn a_pause_ends_whoever_dies_meanwhile() {
    inside("held::a_pause_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Pause));
}

#[test]
fn a_resume_ends_whoever_dies_meanwhile() {
    inside("held::a_resume_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Resume));
}

#[test]
fn a_snapshot_ends_whoever_dies_meanwhile() {
    inside("held::a_snapshot_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Snapshot));
}

#[test]
fn a_clone_ends_whoever_dies_meanwhile() {
    inside("held::a_clone_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Clone));
}

#[test]
fn going_back_to_a_snapshot_ends_whoever_dies_meanwhile() {
    inside("held::going_back_to_a_snapshot_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Restore));
}

#[test]
fn a_delete_ends_whoever_dies_meanwhile() {
    inside("held::a_delete_ends_whoever_dies_meanwhile", struck_everywhere(Verb::Delete));
}
