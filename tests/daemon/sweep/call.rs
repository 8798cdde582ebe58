//! One call of a sweep: from a world at rest to where it begins, the call itself, what it must have come to, and
//! back to rest. A server that nobody calls about runs beside it. It kills nobody; `sweep` does.
use std::collections::BTreeSet;
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{LOOK_AGAIN, Stage, import_body, server_body, wait_for};
use crate::world::World;

/// Names of the server and the image that calls are about.
pub(crate) const SUBJECT: &str = "subject";

/// Name of a server that nobody calls about.
const BYSTANDER: &str = "bystander";

/// How often a guest counts.
const BEAT: Duration = Duration::from_millis(100);

/// In the long form, how many daemons die one after the other: as many points as a start has, and some of its work.
const SUCCESSORS_LONG: u64 = 12;

/// The calls that are swept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Create,
    Clone,
    Fork,
    Start,
    Stop,
    Reboot,
    Reset,
    Pause,
    Resume,
    Snapshot,
    Restore,
    Delete,
    Import,
    DeleteImage,
}

impl Verb {
    /// Whether it is about an image rather than a server.
    fn is_about_an_image(self) -> bool {
        matches!(self, Verb::Import | Verb::DeleteImage)
    }

    /// Whether there is a server between two calls.
    fn keeps_its_server(self) -> bool {
        !self.is_about_an_image() && !matches!(self, Verb::Create | Verb::Clone | Verb::Fork | Verb::Delete)
    }

    /// Kind of its operation.
    fn kind(self) -> &'static str {
        match self {
            Verb::Create | Verb::Clone | Verb::Fork => "server.create",
            Verb::Start => "server.start",
            Verb::Stop => "server.stop",
            Verb::Reboot | Verb::Reset => "server.reboot",
            Verb::Pause => "server.pause",
            Verb::Resume => "server.resume",
            Verb::Snapshot => "server.snapshot",
            Verb::Restore => "server.restore",
            Verb::Delete => "server.delete",
            Verb::Import => "image.import",
            Verb::DeleteImage => "image.delete",
        }
    }
}

/// What a call is about, before and after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    /// The server's id.
    id: Option<String>,
    /// The server's state, or the image's; none when there is none.
    state: Option<String>,
    /// Its VMM.
    vmm: Option<i32>,
    /// How often its guest has booted.
    pub(crate) boots: usize,
}

/// A call that is repeated, on a stage of its own.
pub(crate) struct Sweep {
    pub(crate) stage: Stage,
    pub(crate) verb: Verb,
    pub(crate) bystander: String,
    bystander_vmm: i32,
    /// Id of the server that is there between two calls, or of what is to be deleted.
    subject: Option<String>,
    /// What there is between two calls.
    pub(crate) rest: World,
    /// Id of the snapshot that calls are about.
    snapshot: String,
    /// Makes keys that were never used.
    calls: u32,
    /// How many daemons die after the first, each a point later in what it takes up, before one may live.
    pub(crate) successors: u64,
}

impl Sweep {
    pub(crate) async fn new(verb: Verb) -> Sweep {
        let stage = Stage::new();
        stage.open_well().await;
        stage.import().await;
        let bystander = stage.create(BYSTANDER).await;
        let bystander_vmm = stage.vmms()[BYSTANDER];
        let subject = if verb.keeps_its_server() { Some(stage.create(SUBJECT).await) } else { None };
        let rest = stage.look();
        let successors = if std::env::var_os("TOFT_LONG").is_some() { SUCCESSORS_LONG } else { 0 };
        let mut sweep = Sweep {
            stage,
            verb,
            bystander,
            bystander_vmm,
            subject,
            rest,
            snapshot: String::new(),
            calls: 0,
            successors,
        };
        if matches!(verb, Verb::Start | Verb::Stop) {
            sweep.act("stop", 0).await;
        }
        match verb {
            Verb::Restore => sweep.take(&sweep.subject.clone().expect("a subject")).await,
            Verb::Clone => sweep.take(&sweep.bystander.clone()).await,
            _ => {}
        }
        // What is in the background at the first look must have ended, or its end would be a difference.
        sweep.rest = sweep.settled().await;
        sweep
    }

    /// The world when it does not change any more.
    pub(crate) async fn settled(&self) -> World {
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

    pub(crate) fn key(&mut self, what: &str) -> String {
        self.calls += 1;
        format!("{what}-{}", self.calls)
    }

    /// An action on the subject that must succeed.
    pub(crate) async fn act(&mut self, action: &str, grace_s: u32) {
        let id = self.subject.clone().expect("a subject");
        let body = (action == "stop").then(|| json!({ "grace_s": grace_s }));
        let key = self.key(action);
        let answer =
            self.stage.call(Method::POST, &format!("/v1/servers/{id}/actions/{action}"), &key, body).await;
        self.stage.succeeded(&answer.operation()).await.unwrap();
    }

    /// Takes a snapshot of a server, with its memory, when its guest has counted once.
    async fn take(&mut self, id: &str) {
        let beat = async || (self.stage.beats(id).await.0 > 0).then_some(());
        wait_for("a beat", beat).await.unwrap();
        let key = self.key("take");
        let body = json!({ "name": SUBJECT, "memory": true });
        let path = format!("/v1/servers/{id}/actions/snapshot");
        let answer = self.stage.call(Method::POST, &path, &key, Some(body)).await;
        self.stage.succeeded(&answer.operation()).await.unwrap();
        self.snapshot = text(&answer.body["resource"]["id"]);
    }

    /// From rest to where the call begins.
    pub(crate) async fn prepare(&mut self) {
        let boots = self.subject().await.boots;
        let more_boots = match self.verb {
            Verb::Stop => {
                self.act("start", 0).await;
                1
            }
            Verb::Delete => {
                self.subject = Some(self.stage.create(SUBJECT).await);
                1
            }
            Verb::DeleteImage => {
                let key = self.key("import");
                let body = Some(import_body(SUBJECT));
                let answer = self.stage.call(Method::POST, "/v1/images", &key, body).await;
                self.stage.succeeded(&answer.operation()).await.unwrap();
                self.subject = self.image().await.map(|image| text(&image["id"]));
                return;
            }
            Verb::Reboot | Verb::Reset | Verb::Pause | Verb::Resume | Verb::Snapshot | Verb::Restore => 0,
            _ => return,
        };
        // A guest that has counted once sees its button.
        let id = self.subject.clone().expect("a subject");
        let beat = wait_for("a beat", async || {
            let (beats, boots_now) = self.stage.beats(&id).await;
            (boots_now >= boots + more_boots && beats > 0).then_some(())
        });
        beat.await.unwrap();
        if self.verb == Verb::Resume {
            self.act("pause", 0).await;
        }
    }

    /// From where the call ended back to rest.
    pub(crate) async fn tidy(&mut self) {
        match self.verb {
            Verb::Create | Verb::Clone | Verb::Fork => {
                let server = self.server().await.expect("a server");
                let key = self.key("delete");
                let path = format!("/v1/servers/{}", text(&server["id"]));
                let answer = self.stage.call(Method::DELETE, &path, &key, None).await;
                self.stage.succeeded(&answer.operation()).await.unwrap();
            }
            Verb::Start => self.act("stop", 0).await,
            Verb::Pause => self.act("resume", 0).await,
            Verb::Import => {
                let image = self.image().await.expect("an image");
                let key = self.key("delete");
                let path = format!("/v1/images/{}", text(&image["id"]));
                let answer = self.stage.call(Method::DELETE, &path, &key, None).await;
                self.stage.succeeded(&answer.operation()).await.unwrap();
            }
            Verb::Snapshot => {
                for snapshot in self.stage.api().all("/v1/snapshots").await {
                    let key = self.key("delete");
                    let path = format!("/v1/snapshots/{}", text(&snapshot["id"]));
                    let answer = self.stage.call(Method::DELETE, &path, &key, None).await;
                    self.stage.succeeded(&answer.operation()).await.unwrap();
                }
            }
            Verb::Delete | Verb::DeleteImage => self.subject = None,
            Verb::Stop | Verb::Reboot | Verb::Reset | Verb::Resume | Verb::Restore => {}
        }
    }

    pub(crate) async fn server(&self) -> Option<Value> {
        let mut page = self.stage.api().get(&format!("/v1/servers?name={SUBJECT}")).await;
        page["items"].as_array_mut()?.pop()
    }

    /// There is no server any more.
    pub(crate) fn forget_subject(&mut self) {
        self.subject = None;
    }

    async fn image(&self) -> Option<Value> {
        let mut page = self.stage.api().get(&format!("/v1/images?name={SUBJECT}")).await;
        page["items"].as_array_mut()?.pop()
    }

    /// The subject as it is.
    pub(crate) async fn subject(&self) -> Subject {
        if self.verb.is_about_an_image() {
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
    pub(crate) async fn operations(&self) -> BTreeSet<String> {
        let all = self.stage.api().all("/v1/operations").await;
        all.iter().filter(|one| one["kind"] == self.verb.kind()).map(|one| text(&one["id"])).collect()
    }

    /// The call, once. Answers the operation, or none when the daemon died first.
    pub(crate) async fn call(&self, key: &str) -> Result<Option<(String, bool)>, String> {
        let id = self.subject.clone().unwrap_or_default();
        let action = |verb: &str| format!("/v1/servers/{id}/actions/{verb}");
        let (method, path, body) = match self.verb {
            Verb::Create => (Method::POST, "/v1/servers".to_owned(), Some(server_body(SUBJECT))),
            Verb::Start => (Method::POST, action("start"), None),
            Verb::Stop => (Method::POST, action("stop"), Some(json!({ "grace_s": 30 }))),
            Verb::Reboot => (Method::POST, action("reboot"), Some(json!({ "grace_s": 30 }))),
            Verb::Reset => (Method::POST, action("reboot"), Some(json!({ "grace_s": 0 }))),
            Verb::Pause => (Method::POST, action("pause"), None),
            Verb::Resume => (Method::POST, action("resume"), None),
            Verb::Snapshot => (Method::POST, action("snapshot"), Some(json!({ "memory": true }))),
            Verb::Clone => {
                let path = format!("/v1/snapshots/{}/actions/clone", self.snapshot);
                (Method::POST, path, Some(json!({ "name": SUBJECT })))
            }
            Verb::Fork => {
                let path = format!("/v1/servers/{}/actions/clone", self.bystander);
                (Method::POST, path, Some(json!({ "name": SUBJECT })))
            }
            Verb::Restore => {
                (Method::POST, action("restore"), Some(json!({ "snapshot": SUBJECT, "stop": true })))
            }
            Verb::Delete => (Method::DELETE, format!("/v1/servers/{id}"), None),
            Verb::DeleteImage => (Method::DELETE, format!("/v1/images/{id}"), None),
            Verb::Import => (Method::POST, "/v1/images".to_owned(), Some(import_body(SUBJECT))),
        };
        match self.stage.api().call(method, &path, Some(key), body).await {
            Ok(answer) if answer.is_ok() => Ok(Some((answer.operation(), answer.replayed))),
            Ok(answer) => Err(format!("the call was refused: {}", answer.body)),
            Err(_) => Ok(None),
        }
    }

    /// What the call must have come to, by any way.
    pub(crate) async fn reached(&self, before: &Subject) -> Result<(), String> {
        let (state, boots) = match self.verb {
            Verb::Create => (Some("running"), 1),
            // It goes on from where it was, on a console that has seen no boot.
            Verb::Clone | Verb::Fork => (Some("running"), 0),
            Verb::Start | Verb::Reboot | Verb::Reset => (Some("running"), before.boots + 1),
            Verb::Stop => (Some("stopped"), before.boots),
            Verb::Pause => (Some("paused"), before.boots),
            Verb::Resume | Verb::Snapshot | Verb::Restore => (Some("running"), before.boots),
            Verb::Delete | Verb::DeleteImage => (None, 0),
            Verb::Import => (Some("ready"), 0),
        };
        let has_machine = matches!(state, Some("running" | "paused"));
        // The guest says hello, and hears its button, a little after its machine runs.
        let mut now = self.subject().await;
        let booted = wait_for("its boots, and its guest's first beat", async || {
            now = self.subject().await;
            let beats = match &now.id {
                Some(id) if has_machine => self.stage.beats(id).await.0,
                _ => 1,
            };
            (now.boots >= boots && beats > 0).then_some(())
        })
        .await;
        if now.state.as_deref() != state || now.boots != boots || now.vmm.is_some() != has_machine {
            return Err(format!(
                "should be {state:?} after {boots} boots in all, and is {now:?}; was {before:?}"
            ));
        }
        booted?;
        if self.verb == Verb::Snapshot {
            let all = self.stage.api().all("/v1/snapshots").await;
            let whole = |one: &Value| one["state"] == "ready" && one["memory"] == true;
            if all.len() != 1 || !all.iter().all(whole) {
                return Err(format!("should be one snapshot that is whole: {all:?}"));
            }
        }
        if matches!(self.verb, Verb::Reset | Verb::Pause | Verb::Resume | Verb::Snapshot)
            && now.vmm != before.vmm
        {
            return Err(format!("its VMM is another: {now:?}; was {before:?}"));
        }
        match (self.verb, &now.id) {
            (Verb::Pause, Some(id)) => self.stands_still(id).await,
            (Verb::Resume | Verb::Snapshot | Verb::Restore | Verb::Clone | Verb::Fork, Some(id)) => {
                self.goes_on(id).await
            }
            _ => Ok(()),
        }
    }

    /// Its guest counts on.
    async fn goes_on(&self, id: &str) -> Result<(), String> {
        let (beats, _) = self.stage.beats(id).await;
        wait_for("more beats", async || (self.stage.beats(id).await.0 > beats + 2).then_some(())).await
    }

    /// Its guest counts no more, for as long as three beats take.
    async fn stands_still(&self, id: &str) -> Result<(), String> {
        let (beats, _) = self.stage.beats(id).await;
        tokio::time::sleep(BEAT * 3).await;
        match self.stage.beats(id).await.0 {
            now if now == beats => Ok(()),
            now => Err(format!("a parked guest counted from {beats} to {now}")),
        }
    }

    /// Nobody asked, as far as the records say: the subject is as it was, and a guest goes on counting.
    pub(crate) async fn is_untouched(&self, before: &Subject) -> Result<(), String> {
        let changed = |now: &Subject| format!("nothing is recorded, and {before:?} has become {now:?}");
        let now = self.subject().await;
        if now != *before {
            return Err(changed(&now));
        }
        let (Some(id), Some(_)) = (&now.id, now.vmm) else { return Ok(()) };
        let as_before = match now.state.as_deref() {
            Some("paused") => self.stands_still(id).await,
            _ => self.goes_on(id).await,
        };
        as_before.map_err(|why| format!("{why}: {}", changed(&now)))?;
        let now = self.subject().await;
        if now == *before { Ok(()) } else { Err(changed(&now)) }
    }

    /// The other server was never stopped: the same process, one boot, and it counts on.
    pub(crate) async fn bystander_is_well(&self, beats_before: u64) -> Result<(), String> {
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
