//! The daemon dies at every point that a crash could follow, one after the other: after each commit and each effect
//! of a call, as counted in a run without a death. Another daemon takes over, the client repeats its call with its
//! key, and nothing shows that anybody died: one operation, one effect, nothing left over, no other server touched.
//! The whole sweep takes half a minute. In its long form a dozen daemons die in a row, each a point later than the
//! one before, before one may live.
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{LOOK_AGAIN, Orders, Stage, import_body, server_body, wait_for, was_killed};
use crate::world::{World, inside};

/// Names of the server and the image that calls are about.
const SUBJECT: &str = "subject";

/// Name of a server that nobody calls about.
const BYSTANDER: &str = "bystander";

/// How long points may follow the end of an operation: what the daemon does in the background.
const AFTERWARDS: Duration = Duration::from_millis(1500);

/// In the long form, how many daemons die one after the other: as many points as a start has, and some of its work.
const SUCCESSORS_LONG: u64 = 12;

/// The calls that are swept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Create,
    Start,
    Stop,
    Reboot,
    Reset,
    Delete,
    Import,
}

impl Verb {
    /// Kind of its operation.
    fn kind(self) -> &'static str {
        match self {
            Verb::Create => "server.create",
            Verb::Start => "server.start",
            Verb::Stop => "server.stop",
            Verb::Reboot | Verb::Reset => "server.reboot",
            Verb::Delete => "server.delete",
            Verb::Import => "image.import",
        }
    }
}

/// What a call is about, before and after.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Subject {
    /// The server's id.
    id: Option<String>,
    /// The server's state, or the image's; none when there is none.
    state: Option<String>,
    /// Its VMM.
    vmm: Option<i32>,
    /// How often its guest has booted.
    boots: usize,
}

/// How one point came out.
#[derive(Debug, PartialEq, Eq)]
enum Met {
    /// The daemon died there, and all was well.
    Died,
    /// The daemon did not get there: what it does in the background is not the same every time.
    NotReached,
}

struct Sweep {
    stage: Stage,
    verb: Verb,
    bystander: String,
    bystander_vmm: i32,
    /// The subject's id, where there is a server between two calls.
    subject: Option<String>,
    /// What there is between two calls.
    rest: World,
    /// Makes keys that were never used.
    calls: u32,
    /// How many daemons die after the first, each a point later in what it takes up, before one may live.
    successors: u64,
}

impl Sweep {
    async fn new(verb: Verb) -> Sweep {
        let stage = Stage::new();
        stage.open_well().await;
        stage.import().await;
        let bystander = stage.create(BYSTANDER).await;
        let bystander_vmm = stage.vmms()[BYSTANDER];
        let subject = match verb {
            Verb::Start | Verb::Stop | Verb::Reboot | Verb::Reset => Some(stage.create(SUBJECT).await),
            _ => None,
        };
        let rest = stage.look();
        let successors = if std::env::var_os("TOFT_LONG").is_some() { SUCCESSORS_LONG } else { 0 };
        let mut sweep = Sweep { stage, verb, bystander, bystander_vmm, subject, rest, calls: 0, successors };
        if matches!(verb, Verb::Start | Verb::Stop) {
            sweep.act("stop", 0).await;
        }
        // What is in the background at the first look must have ended, or its end would be a difference.
        sweep.rest = sweep.settled().await;
        sweep
    }

    /// The world when it does not change any more.
    async fn settled(&self) -> World {
        let mut last = self.stage.look();
        let settled = wait_for("a world that stands still", async || {
            tokio::time::sleep(LOOK_AGAIN * 10).await;
            let now = self.stage.look();
            let same = now == last;
            last = now;
            same.then(|| last.clone())
        });
        settled.await.unwrap()
    }

    fn key(&mut self, what: &str) -> String {
        self.calls += 1;
        format!("{what}-{}", self.calls)
    }

    /// An action on the subject that must succeed.
    async fn act(&mut self, action: &str, grace_s: u32) {
        let id = self.subject.clone().expect("a subject");
        let body = if action == "start" { None } else { Some(json!({ "grace_s": grace_s })) };
        let key = self.key(action);
        let answer =
            self.stage.call(Method::POST, &format!("/v1/servers/{id}/actions/{action}"), &key, body).await;
        self.stage.succeeded(&answer.operation()).await.unwrap();
    }

    /// From rest to where the call begins.
    async fn prepare(&mut self) {
        let boots = self.subject().await.boots;
        match self.verb {
            Verb::Stop => self.act("start", 0).await,
            Verb::Delete => self.subject = Some(self.stage.create(SUBJECT).await),
            _ => return,
        }
        // A guest that has counted once sees its button.
        let id = self.subject.as_deref().expect("a subject");
        let beat = wait_for("a beat", async || {
            let (beats, boots_now) = self.stage.beats(id).await;
            (boots_now > boots && beats > 0).then_some(())
        });
        beat.await.unwrap();
    }

    /// From where the call ended back to rest.
    async fn tidy(&mut self) {
        match self.verb {
            Verb::Create => {
                let server = self.server().await.expect("a server");
                let key = self.key("delete");
                let path = format!("/v1/servers/{}", text(&server["id"]));
                let answer = self.stage.call(Method::DELETE, &path, &key, None).await;
                self.stage.succeeded(&answer.operation()).await.unwrap();
            }
            Verb::Start => self.act("stop", 0).await,
            Verb::Import => {
                let image = self.image().await.expect("an image");
                let key = self.key("delete");
                let path = format!("/v1/images/{}", text(&image["id"]));
                let answer = self.stage.call(Method::DELETE, &path, &key, None).await;
                self.stage.succeeded(&answer.operation()).await.unwrap();
            }
            Verb::Delete => self.subject = None,
            Verb::Stop | Verb::Reboot | Verb::Reset => {}
        }
    }

    async fn server(&self) -> Option<Value> {
        let mut page = self.stage.api().get(&format!("/v1/servers?name={SUBJECT}")).await;
        page["items"].as_array_mut()?.pop()
    }

    async fn image(&self) -> Option<Value> {
        let mut page = self.stage.api().get(&format!("/v1/images?name={SUBJECT}")).await;
        page["items"].as_array_mut()?.pop()
    }

    /// The subject as it is.
    async fn subject(&self) -> Subject {
        if self.verb == Verb::Import {
            let state = self.image().await.map(|image| text(&image["state"]));
            return Subject { id: None, state, vmm: None, boots: 0 };
        }
        let vmm = self.stage.vmms().get(SUBJECT).copied();
        let Some(server) = self.server().await else {
            return Subject { id: None, state: None, vmm, boots: 0 };
        };
        let id = text(&server["id"]);
        self.stage.knows(&id);
        let boots = self.stage.beats(&id).await.1;
        Subject { id: Some(id), state: Some(text(&server["state"])), vmm, boots }
    }

    /// Ids of operations of the call's kind.
    async fn operations(&self) -> BTreeSet<String> {
        let all = self.stage.api().all("/v1/operations").await;
        all.iter().filter(|one| one["kind"] == self.verb.kind()).map(|one| text(&one["id"])).collect()
    }

    /// The call, once. Answers the operation, or none when the daemon died first.
    async fn call(&self, key: &str) -> Result<Option<(String, bool)>, String> {
        let id = self.subject.clone().unwrap_or_default();
        let action = |verb: &str| format!("/v1/servers/{id}/actions/{verb}");
        let (method, path, body) = match self.verb {
            Verb::Create => (Method::POST, "/v1/servers".to_owned(), Some(server_body(SUBJECT))),
            Verb::Start => (Method::POST, action("start"), None),
            Verb::Stop => (Method::POST, action("stop"), Some(json!({ "grace_s": 30 }))),
            Verb::Reboot => (Method::POST, action("reboot"), Some(json!({ "grace_s": 30 }))),
            Verb::Reset => (Method::POST, action("reboot"), Some(json!({ "grace_s": 0 }))),
            Verb::Delete => (Method::DELETE, format!("/v1/servers/{id}"), None),
            Verb::Import => (Method::POST, "/v1/images".to_owned(), Some(import_body(SUBJECT))),
        };
        match self.stage.api().call(method, &path, Some(key), body).await {
            Ok(answer) if answer.is_ok() => Ok(Some((answer.operation(), answer.replayed))),
            Ok(answer) => Err(format!("the call was refused: {}", answer.body)),
            Err(_) => Ok(None),
        }
    }

    /// The call from rest to rest with a daemon that lives; answers the points it passed from its start on, each as
    /// its name with its number among those of that name.
    async fn count(&mut self) -> Vec<String> {
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

    /// What the call must have come to, by any way.
    async fn reached(&self, before: &Subject) -> Result<(), String> {
        let (state, boots) = match self.verb {
            Verb::Create => (Some("running"), 1),
            Verb::Start | Verb::Reboot | Verb::Reset => (Some("running"), before.boots + 1),
            Verb::Stop => (Some("stopped"), before.boots),
            Verb::Delete => (None, 0),
            Verb::Import => (Some("ready"), 0),
        };
        let should_run = state == Some("running");
        // The guest says hello, and hears its button, a little after its machine runs.
        let mut now = self.subject().await;
        let _ = wait_for("its boots", async || {
            now = self.subject().await;
            let beats = match &now.id {
                Some(id) if should_run => self.stage.beats(id).await.0,
                _ => 1,
            };
            (now.boots >= boots && beats > 0).then_some(())
        })
        .await;
        if now.state.as_deref() != state || now.boots != boots || now.vmm.is_some() != should_run {
            return Err(format!(
                "should be {state:?} after {boots} boots in all, and is {now:?}; was {before:?}"
            ));
        }
        if self.verb == Verb::Reset && now.vmm != before.vmm {
            return Err(format!("a reset took its VMM: {now:?}; was {before:?}"));
        }
        Ok(())
    }

    /// One death at a point.
    async fn die_at(&mut self, point: &str, late_commits: bool) -> Result<Met, String> {
        self.prepare().await;
        let before = self.subject().await;
        let operations_before = self.operations().await;
        let (beats_before, _) = self.stage.beats(&self.bystander).await;
        self.stage.kill().await;

        let key = self.key("swept");
        let orders = Orders { die_at: Some(point.to_owned()), late_commits };
        let mut acknowledged = None;
        let met = match self.stage.open(orders).await {
            Err(status) if was_killed(status) => Met::Died,
            Err(status) => return Err(format!("the daemon ended with {status}")),
            Ok(()) => {
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
            match self.stage.open(Orders { die_at: Some(successor.to_string()), late_commits: false }).await {
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

    /// Nobody asked, as far as the records say: the subject is as it was, and a guest goes on counting.
    async fn is_untouched(&self, before: &Subject) -> Result<(), String> {
        let changed = |now: &Subject| format!("nothing is recorded, and {before:?} has become {now:?}");
        let now = self.subject().await;
        if now != *before {
            return Err(changed(&now));
        }
        let (Some(id), Some(_)) = (&now.id, now.vmm) else { return Ok(()) };
        let (beats, _) = self.stage.beats(id).await;
        let goes_on =
            wait_for("more beats", async || (self.stage.beats(id).await.0 > beats + 2).then_some(()));
        goes_on.await.map_err(|late| format!("{late}: {}", changed(&now)))?;
        let now = self.subject().await;
        if now == *before { Ok(()) } else { Err(changed(&now)) }
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

    /// The other server was never stopped: the same process, one boot, and it counts on.
    async fn bystander_is_well(&self, beats_before: u64) -> Result<(), String> {
        let vmm = self.stage.vmms().get(BYSTANDER).copied();
        if vmm != Some(self.bystander_vmm) {
            return Err(format!("the bystander's VMM was {} and is {vmm:?}", self.bystander_vmm));
        }
        wait_for("the bystander's next beat", async || {
            let (beats, boots) = self.stage.beats(&self.bystander).await;
            (beats > beats_before && boots == 1).then_some(())
        })
        .await
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
fn a_delete_before_its_commit_is_caught() {
    inside("sweep::a_delete_before_its_commit_is_caught", sweep_with_late_commits(Verb::Delete));
}

#[test]
fn a_create_before_its_commit_is_caught() {
    inside("sweep::a_create_before_its_commit_is_caught", sweep_with_late_commits(Verb::Create));
}
