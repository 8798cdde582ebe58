//! New servers that go on from a snapshot's memory, each with a disk, hardware addresses, addresses and a name of its own.
//! All of one call are recorded in one transaction, so a daemon that dies has made all of them or none; their actors make
//! them as they make any server, and restore what others boot. Memory is the snapshot's file, mapped by each machine, which
//! keeps what it writes to itself. Called by the facade.
use model::limits as bounds;
use model::operation::{Operation, Resource};
use model::server::{BulkAction, BulkActions, CreateNic, ServerNic};
use model::snapshot::{CreateClones, CreateSnapshot, GuestIdentity, SnapshotState};
use model::{Code, Labels, Name, OperationId, ServerId, SnapshotId, Time};
use rusqlite::Connection;

use super::lifecycle::{Event, Life, Saved, SavedOf, Trouble, step};
use super::record::{self, Disk, Held, ServerRecord};
use super::registry::Workshop;
use super::{Servers, advance, create, snapshot};
use crate::call::{Actor, Answer, Call};
use crate::error::{Error, Result};
use crate::operations::{self, NewOperation};
use crate::snapshots::{SnapshotRecord, Snapshots};
use crate::store::{Tx, records};
use crate::volumes::{NewVolume, space};

impl Servers {
    /// Makes servers that go on from where a snapshot was taken, memory and disk. Fails as a create does; then none is
    /// made.
    pub async fn clone_snapshot(
        &self,
        call: &Call,
        id: SnapshotId,
        spec: CreateClones,
    ) -> Result<Answer<BulkActions>> {
        let (workshop, conditions) = (self.workshop().clone(), call.clone());
        workshop.processor.known().await;
        let make = move |tx: &Tx<'_>| {
            let found: SnapshotRecord = records::one(tx, id.0)?;
            conditions.check_match(found.shown.generation)?;
            all(tx, &workshop, &found, &spec, &conditions.actor)
        };
        let answer = self.workshop().core.mutate(call, make).await?;
        if !answer.replayed {
            self.workshop().snapshots.read_ahead(id);
        }
        Ok(self.made(answer))
    }

    /// Makes servers that go on from what a server is now, memory and disk. It runs on, as when a snapshot of it is taken.
    /// Fails as that and a create do; then nothing is done.
    pub async fn clone_server(
        &self,
        call: &Call,
        id: ServerId,
        spec: CreateClones,
    ) -> Result<Answer<BulkActions>> {
        self.workshop().processor.known().await;
        let make = move |tx: &Tx<'_>, workshop: &Workshop, record, actor: &Actor| {
            of_server(tx, workshop, record, &spec, actor)
        };
        let answer = self.change(call, id, make).await?;
        Ok(self.made(answer))
    }

    /// Has the actors of those that were just recorded look at what is to be done.
    fn made(&self, answer: Answer<BulkActions>) -> Answer<BulkActions> {
        self.workshop().networks.wake();
        if !answer.replayed {
            answer.body.items.iter().for_each(|item| self.registry.poke(item.server_id));
        }
        answer
    }
}

/// For `snapshots`: names of the servers that go back to one, or are to go on from its memory.
pub(crate) fn users_of_snapshot(connection: &Connection, snapshot: SnapshotId) -> Result<Vec<Name>> {
    let all: Vec<ServerRecord> = records::all(connection)?;
    let needs = |record: &ServerRecord| {
        let from = record.life.saved.and_then(|saved| saved.of.snapshot());
        let goes_on = [record.life.phase.returns_to(), record.life.awaited(), from];
        goes_on.contains(&Some(snapshot))
    };
    Ok(all.into_iter().filter(needs).map(|record| record.name).collect())
}

/// Clones of a snapshot that is there.
fn all(
    tx: &Tx<'_>,
    workshop: &Workshop,
    found: &SnapshotRecord,
    spec: &CreateClones,
    actor: &Actor,
) -> Result<BulkActions> {
    let shown = &found.shown;
    if shown.state != SnapshotState::Ready {
        let detail = format!("snapshot {} is not ready", shown.name);
        return Err(Error::new(Code::WrongState, detail));
    }
    let Some(saved) = saved_in(found) else {
        let detail = format!(
            "snapshot {} has no memory to go on from; a server of its disk can be created with `snapshot`",
            shown.name
        );
        return Err(Error::new(Code::WrongState, detail));
    };
    can_go_on(workshop, found)?;
    let disk_bytes = workshop.volumes.cloned_bytes(found, 0);
    check_room(workshop, spec, disk_bytes)?;
    each(tx, workshop, found, spec, actor, |life| life.saved = Some(saved))
}

/// Clones of a server that runs: a snapshot of it is taken for them, which expires as soon as nobody needs it, and they
/// wait for it.
fn of_server(
    tx: &Tx<'_>,
    workshop: &Workshop,
    server: ServerRecord,
    spec: &CreateClones,
    actor: &Actor,
) -> Result<BulkActions> {
    let disks = server.disks.iter().map(|disk| workshop.volumes.cloned_bytes_of(disk.volume_id));
    check_room(workshop, spec, disks.sum())?;
    let taken = CreateSnapshot {
        description: format!("for clones of server {}", server.name),
        memory: true,
        ..CreateSnapshot::default()
    };
    let mut found = snapshot::describe(tx, workshop, SnapshotId::new(), &server, taken)?;
    // Counts from when it is ready, and while nobody needs it.
    found.shown.expires_at = Some(found.shown.created_at);
    found.origin.for_clones = true;
    snapshot::begin(tx, workshop, server, &found, actor)?;
    let id = found.shown.id;
    each(tx, workshop, &found, spec, actor, |life| life.awaits = Some(id))
}

/// In the transaction in which the work on a snapshot has ended, and why if it failed: servers that wait for it go on from it, or come to
/// nothing.
pub(super) fn settle(tx: &Tx<'_>, id: SnapshotId, why: Option<&Trouble>) -> Result<()> {
    let Some(found) = Snapshots::find(tx, id)?.filter(|found| found.origin.for_clones) else { return Ok(()) };
    let all: Vec<ServerRecord> = records::all(tx)?;
    for mut record in all.into_iter().filter(|record| record.life.awaited() == Some(id)) {
        match saved_in(&found).filter(|_| found.shown.state == SnapshotState::Ready) {
            Some(saved) => {
                record.life.go_on_from(saved);
                record::save(tx, &mut record)?;
            }
            None => {
                let name = &found.shown.server_name;
                let why = why.map(|why| format!(": {}", why.detail)).unwrap_or_default();
                let detail = format!("no snapshot could be taken of server {name}{why}");
                let trouble = Trouble { code: Code::MachineFailed, detail };
                let next = step(&record.life, Event::MakeFailed(trouble), record.context());
                advance::save(tx, record, next, &Actor::Host)?;
            }
        }
    }
    Ok(())
}

/// Refuses a memory whose guest was shown another processor than this host has: no machine could go on from it. What cannot
/// be judged is left to the VMM.
pub(super) fn can_go_on(workshop: &Workshop, found: &SnapshotRecord) -> Result<()> {
    let had = found.origin.processor.as_ref().filter(|_| found.shown.memory);
    match had.and_then(|had| workshop.processor.found_out().refuses(had)) {
        None => Ok(()),
        Some(detail) => {
            let detail = format!(
                "what snapshot {} has in memory cannot go on here: {detail}; a server of its disk can be \
                 created with `snapshot`",
                found.shown.name
            );
            Err(Error::new(Code::WrongState, detail))
        }
    }
}

/// What there is of a machine in a snapshot.
fn saved_in(found: &SnapshotRecord) -> Option<Saved> {
    let of = SavedOf::Clone { snapshot: found.shown.id };
    Some(Saved { root: found.root?, stored_bytes: found.shown.stored_bytes, of })
}

/// Whether so many are allowed, and what is copied for their disks would fit.
fn check_room(workshop: &Workshop, spec: &CreateClones, disk_bytes: u64) -> Result<()> {
    if !(1..=bounds::CLONES_MAX).contains(&spec.count) {
        let detail = format!("must be between 1 and {}", bounds::CLONES_MAX);
        return Err(Error::invalid("/count", "out_of_range", detail));
    }
    let needed = disk_bytes.saturating_mul(u64::from(spec.count));
    space::check(&workshop.core.dirs.root().join("volumes"), needed, 0)
}

/// Records them; `begin` says what each begins with.
fn each(
    tx: &Tx<'_>,
    workshop: &Workshop,
    found: &SnapshotRecord,
    spec: &CreateClones,
    actor: &Actor,
    begin: impl Fn(&mut Life),
) -> Result<BulkActions> {
    let mut items = Vec::new();
    for number in 1..=spec.count {
        let name = numbered(spec, number)?;
        let operation_id = OperationId::new();
        let mut life = Life::new(operation_id, true);
        begin(&mut life);
        let (operation, record) =
            one(tx, workshop, found, (operation_id, life), (name, spec.labels.clone()), actor)?;
        let (server_id, name) = (record.id, record.name);
        items.push(BulkAction { server_id, name, operation: Some(operation), problem: None });
    }
    Ok(BulkActions { items })
}

fn numbered(spec: &CreateClones, number: u16) -> Result<Name> {
    if spec.count == 1 {
        return Ok(spec.name.clone());
    }
    let text = format!("{}-{number}", spec.name);
    let too_long = || format!("{text} would be too long a name; choose a shorter one");
    text.parse().map_err(|_| Error::invalid("/name", "too_long", too_long()))
}

fn one(
    tx: &Tx<'_>,
    workshop: &Workshop,
    found: &SnapshotRecord,
    (operation_id, life): (OperationId, Life),
    (name, labels): (Name, Labels),
    actor: &Actor,
) -> Result<(Operation, ServerRecord)> {
    let (shown, origin) = (&found.shown, &found.origin);
    let (id, now) = (ServerId::new(), Time::now());
    let mut disks = Vec::new();
    // Servers have one disk or none.
    for (volume, used) in shown.volumes.iter().zip(&origin.disks) {
        let new = NewVolume {
            name: create::volume_name(&name, id)?,
            labels: Labels::default(),
            size_bytes: volume.size_bytes,
            image_id: Some(shown.image_id),
            snapshot_id: Some(shown.id),
            server_id: Some(id),
            is_clone: true,
        };
        let volume = workshop.volumes.create(tx, new)?;
        disks.push(Disk { volume_id: volume.id, cache: used.cache, limits: used.limits });
    }
    let mut record = ServerRecord {
        id,
        name,
        description: String::new(),
        labels,
        external_ref: None,
        life,
        vcpus: shown.vcpus,
        memory_bytes: shown.memory_bytes,
        cpu: shown.cpu.clone(),
        held: Held::default(),
        image_id: shown.image_id,
        default_user: origin.default_user.clone(),
        disks,
        nics: Vec::new(),
        ssh_keys: origin.ssh_keys.clone(),
        user_data: origin.user_data.clone(),
        restart_policy: origin.restart_policy,
        isolation: origin.isolation,
        sandbox: None,
        cage: None,
        identity: Some(GuestIdentity::Unchanged),
        vmm_build: None,
        descent: origin.descent.wrapping_add(1),
        generation: 1,
        created_at: now,
        updated_at: now,
        started_at: None,
    };
    // On the same networks, with addresses of its own.
    let again = |nic: &ServerNic| CreateNic {
        network: Some(nic.network_id.to_string()),
        ipv4: None,
        limits: nic.limits,
    };
    let wanted = origin.nics.iter().map(again).collect();
    record.nics = create::reserve(tx, &workshop.networks, &record, wanted).map_err(without_network)?;
    create::before_start(workshop, &record)?;
    workshop.capacity.admit(tx, &mut record)?;
    if let Some(had) = &origin.processor {
        record.held.go_on_with(had);
    }
    record::insert(tx, &record)?;
    let mut resources = vec![Resource::Server(id), Resource::Snapshot(shown.id)];
    resources.extend(record.disks.iter().map(|disk| Resource::Volume(disk.volume_id)));
    let new = NewOperation { kind: "server.create", resources, actor, cancellable: true };
    let operation = operations::accept_as(tx, operation_id, new)?;
    advance::announce(tx, &record, "server.created", Some(actor))?;
    Ok((operation, record))
}

/// A request for clones names no network, so one that is gone is told otherwise than to who asks for a server.
fn without_network(cause: Error) -> Error {
    let is_it = |field: &model::FieldError| field.pointer.ends_with("/network");
    if !cause.errors.first().is_some_and(is_it) {
        return cause;
    }
    let detail = "a network that the first server was on has been deleted, and its guest knows no other; \
                  a server of its disk can be created with `snapshot` on another";
    Error::new(Code::NotFound, detail).caused_by(cause)
}
