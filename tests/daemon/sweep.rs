//! The daemon dies at every point that a crash could follow, one after the other: after each commit and each effect
//! of a call, as counted in a run without a death. Another daemon takes over, the client repeats its call with its
//! key, and nothing shows that anybody died: one operation, one effect, nothing left over, no other server touched.
//! The whole sweep takes half a minute. In its long form a dozen daemons die in a row, each a point later than the
//! one before, before one may live.
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::daemon::{LOOK_AGAIN, Orders, wait_for, was_killed};
use crate::world::inside;

pub(crate) mod call;

use call::{Sweep, Verb};

/// How long points may follow the end of an operation: what the daemon does in the background.
pub(crate) const AFTERWARDS: Duration = Duration::from_millis(1500);

/// A daemon that has passed no point for so long has nothing to do.
const QUIET: Duration = Duration::from_millis(500);

/// How one point came out.
#[derive(Debug, PartialEq, Eq)]
enum Met {
    /// The daemon died there, and all was well.
    Died,
    /// The daemon did not get there: what it does in the background is not the same every time.
    NotReached,
}

impl Sweep {
    /// The call from rest to rest with a daemon that lives; answers the points it passed from its start on, each as
    /// its name with its number among those of that name.
    pub(crate) async fn count(&mut self) -> Vec<String> {
        self.prepare().await;
        self.stage.kill().await;
        self.stage.open_well().await;
        let before = self.subject().await;
        let key = self.key("count");
        let (operation, _) = self.call(&key).await.unwrap().expect("an answer");
        self.stage.succeeded(&operation).await.unwrap();
        self.reached(&before).await.unwrap();
        self.settled().await;
        let names = self.stage.checkpoints();
        self.tidy().await;
        self.stage.same_as(&self.rest).await.unwrap();
        let number = |at: usize| names[..=at].iter().filter(|name| **name == names[at]).count();
        (0..names.len()).map(|at| format!("{}:{}", names[at], number(at))).collect()
    }

    /// One death at a point.
    async fn die_at(&mut self, point: &str, late_commits: bool) -> Result<Met, String> {
        self.prepare().await;
        let before = self.subject().await;
        let operations_before = self.operations().await;
        let (beats_before, _) = self.stage.beats(&self.bystander).await;
        self.stage.kill().await;

        let key = self.key("swept");
        let orders = Orders { die_at: Some(point.to_owned()), late_commits, ..Orders::default() };
        let mut acknowledged = None;
        let met = match self.stage.open(orders).await {
            Err(status) if was_killed(status) => Met::Died,
            Err(status) => return Err(format!("the daemon ended with {status}")),
            Ok(()) => {
                if late_commits {
                    self.background_is_quiet().await;
                }
                acknowledged = self.call(&key).await?.map(|(operation, _)| operation);
                if let Some(operation) = &acknowledged {
                    // Whether it ends or the daemon does is seen below.
                    let _ = self.stage.finished(operation).await;
                }
                self.death().await?
            }
        };
        if met == Met::NotReached {
            self.stage.kill().await;
        }
        for successor in 1..=self.successors {
            let orders = Orders { die_at: Some(successor.to_string()), ..Orders::default() };
            match self.stage.open(orders).await {
                Err(status) if was_killed(status) => {}
                Err(status) => return Err(format!("the daemon ended with {status}")),
                Ok(()) => self.stage.kill().await,
            }
        }
        self.stage.open_well().await;

        // What was acknowledged is recorded, and what is not recorded was not begun.
        let recorded: Vec<String> = self.operations().await.difference(&operations_before).cloned().collect();
        if acknowledged.as_ref().is_some_and(|operation| !recorded.contains(operation)) {
            return Err(format!("operation {acknowledged:?} was acknowledged and is forgotten"));
        }
        if recorded.is_empty() {
            self.is_untouched(&before).await?;
        }

        let (operation, replayed) = self.call(&key).await?.ok_or("the second daemon died")?;
        if recorded.first().is_some_and(|recorded| *recorded != operation) || replayed == recorded.is_empty()
        {
            return Err(format!("{recorded:?} was recorded, and the repeated call answered {operation}"));
        }
        let ended = self.stage.finished(&operation).await?;
        let rolled_back = self.verb == Verb::Import && ended["error"]["code"] == "draining";
        if rolled_back {
            // Whoever sent the bytes has to send them again, with a key of its own.
            self.is_untouched(&before).await?;
            let key = self.key("again");
            let (operation, _) = self.call(&key).await?.ok_or("the second daemon died")?;
            self.stage.succeeded(&operation).await?;
        } else if ended["state"] != "succeeded" {
            return Err(format!("it did not succeed: {ended}"));
        }
        self.reached(&before).await?;
        let operations = self.operations().await.difference(&operations_before).count();
        if operations != 1 + usize::from(rolled_back) {
            return Err(format!("one call became {operations} operations"));
        }
        self.tidy().await;
        self.stage.same_as(&self.rest).await?;
        self.bystander_is_well(beats_before).await?;
        Ok(met)
    }

    /// Waits for what a starting daemon does by itself, or for its death: a commit of the background would make a
    /// late one before it lasting.
    async fn background_is_quiet(&self) {
        let (mut last, mut since) = (0, Instant::now());
        let quiet = async || {
            let names = self.stage.checkpoints();
            if names.len() != last {
                (last, since) = (names.len(), Instant::now());
            }
            let settled = names.iter().any(|name| name == "network.settled") && since.elapsed() > QUIET;
            (settled || self.stage.api().read("/v1").await.is_err()).then_some(())
        };
        wait_for("a quiet daemon", quiet).await.unwrap();
    }

    /// Waits for the daemon's death, which may follow the end of the operation by a little.
    async fn death(&self) -> Result<Met, String> {
        let end = Instant::now() + AFTERWARDS;
        loop {
            match self.stage.ended() {
                Some(status) if was_killed(status) => return Ok(Met::Died),
                Some(status) => return Err(format!("the daemon ended with {status}")),
                None if Instant::now() > end => return Ok(Met::NotReached),
                None => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }
}

/// Sweeps a call through every point.
async fn sweep(verb: Verb) {
    let begun = Instant::now();
    let mut sweep = Sweep::new(verb).await;
    let points = sweep.count().await;
    let (mut died, mut not_reached) = (0, 0);
    for point in &points {
        match sweep.die_at(point, false).await {
            Ok(Met::Died) => died += 1,
            Ok(Met::NotReached) => not_reached += 1,
            Err(why) => panic!("{verb:?}, at {point} of {points:?}: {why}"),
        }
    }
    let kinds: BTreeSet<&str> = points.iter().map(|point| point.split(':').next().unwrap_or(point)).collect();
    println!(
        "{verb:?}: {died} deaths at {} points of {} kinds, {not_reached} not reached, all converged, {:.1} s",
        points.len(),
        kinds.len(),
        begun.elapsed().as_secs_f64()
    );
    // The background is a few points of each run; the rest must be met.
    assert!(not_reached * 5 <= points.len(), "{not_reached} of {} points were not reached", points.len());
    assert!(kinds.len() > 2, "only these kinds of points: {kinds:?}; the instrumentation is gone");
    sweep.stage.close().await;
}

#[test]
fn a_create_converges_wherever_the_daemon_dies() {
    inside("sweep::a_create_converges_wherever_the_daemon_dies", sweep(Verb::Create));
}

#[test]
fn a_start_converges_wherever_the_daemon_dies() {
    inside("sweep::a_start_converges_wherever_the_daemon_dies", sweep(Verb::Start));
}

#[test]
fn a_stop_converges_wherever_the_daemon_dies() {
    inside("sweep::a_stop_converges_wherever_the_daemon_dies", sweep(Verb::Stop));
}

#[test]
fn a_reboot_converges_wherever_the_daemon_dies() {
    inside("sweep::a_reboot_converges_wherever_the_daemon_dies", sweep(Verb::Reboot));
}

#[test]
fn a_reset_converges_wherever_the_daemon_dies() {
    inside("sweep::a_reset_converges_wherever_the_daemon_dies", sweep(Verb::Reset));
}

#[test]
fn a_delete_converges_wherever_the_daemon_dies() {
    inside("sweep::a_delete_converges_wherever_the_daemon_dies", sweep(Verb::Delete));
}

#[test]
fn a_pause_converges_wherever_the_daemon_dies() {
    inside("sweep::a_pause_converges_wherever_the_daemon_dies", sweep(Verb::Pause));
}

#[test]
fn a_resume_converges_wherever_the_daemon_dies() {
    inside("sweep::a_resume_converges_wherever_the_daemon_dies", sweep(Verb::Resume));
}

#[test]
fn a_snapshot_converges_wherever_the_daemon_dies() {
    inside("sweep::a_snapshot_converges_wherever_the_daemon_dies", sweep(Verb::Snapshot));
}

#[test]
fn a_clone_converges_wherever_the_daemon_dies() {
    inside("sweep::a_clone_converges_wherever_the_daemon_dies", sweep(Verb::Clone));
}

#[test]
fn a_clone_of_a_server_that_runs_converges_wherever_the_daemon_dies() {
    inside("sweep::a_clone_of_a_server_that_runs_converges_wherever_the_daemon_dies", sweep(Verb::Fork));
}

#[test]
fn going_back_to_a_snapshot_converges_wherever_the_daemon_dies() {
    inside("sweep::going_back_to_a_snapshot_converges_wherever_the_daemon_dies", sweep(Verb::Restore));
}

#[test]
fn the_deletion_of_an_image_converges_wherever_the_daemon_dies() {
    inside("sweep::the_deletion_of_an_image_converges_wherever_the_daemon_dies", sweep(Verb::DeleteImage));
}

#[test]
fn an_import_converges_wherever_the_daemon_dies() {
    inside("sweep::an_import_converges_wherever_the_daemon_dies", sweep(Verb::Import));
}

/// The sweep of a daemon whose commits come after the effects that were to follow them.
async fn sweep_with_late_commits(verb: Verb) {
    let mut sweep = Sweep::new(verb).await;
    let points = sweep.count().await;
    for point in &points {
        if let Err(why) = sweep.die_at(point, true).await {
            println!("{verb:?}: caught at {point}: {why}");
            // What it leaves depends on how far its effects got; a daemon that fails by itself would not show the mistake.
            let fails_itself =
                why.contains("the daemon ended with") || why.contains("the second daemon died");
            assert!(!fails_itself, "something else was wrong: {why}");
            return;
        }
    }
    panic!("{verb:?}: commits come after their effects, and no death at {points:?} shows it");
}

#[test]
fn a_stop_before_its_commit_is_caught() {
    inside("sweep::a_stop_before_its_commit_is_caught", sweep_with_late_commits(Verb::Stop));
}

#[test]
fn a_reboot_before_its_commit_is_caught() {
    inside("sweep::a_reboot_before_its_commit_is_caught", sweep_with_late_commits(Verb::Reboot));
}

#[test]
fn a_create_before_its_commit_is_caught() {
    inside("sweep::a_create_before_its_commit_is_caught", sweep_with_late_commits(Verb::Create));
}

#[test]
fn a_delete_before_its_commit_is_caught() {
    inside("sweep::a_delete_before_its_commit_is_caught", sweep_with_late_commits(Verb::Delete));
}
