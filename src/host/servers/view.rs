//! A server as callers see it, made of its record and its volumes. It changes nothing.
//! Every facade method that answers a server uses it.
use model::Time;
use model::server::{Restart, Server, ServerMachine, ServerVolume};
use rusqlite::Connection;

use super::lifecycle::{Life, Phase};
use super::record::{Held, ServerRecord};
use crate::error::Result;
use crate::volumes::Volumes;

/// A server as callers see it.
pub(super) fn server(connection: &Connection, record: &ServerRecord) -> Result<Server> {
    let volumes = record.disks.iter().zip(0u8..).map(|(disk, index)| {
        // A volume that is purged already belongs to a server that is being deleted.
        let size_bytes = match Volumes::find(connection, disk.volume_id) {
            Ok(volume) => volume.size_bytes,
            Err(cause) if cause.code == model::Code::NotFound => 0,
            Err(cause) => return Err(cause),
        };
        Ok(ServerVolume {
            volume_id: disk.volume_id,
            index,
            size_bytes,
            cache: disk.cache,
            limits: disk.limits,
        })
    });
    let life = &record.life;
    Ok(Server {
        id: record.id,
        name: record.name.clone(),
        description: record.description.clone(),
        labels: record.labels.clone(),
        external_ref: record.external_ref.clone(),
        state: life.phase.state(),
        state_reason: life.phase.why().or(life.clash.as_ref()).cloned(),
        wanted: life.wanted,
        allowed_actions: allowed_actions(record),
        operation_id: life.job.map(|job| job.id),
        vcpus: record.vcpus,
        memory_bytes: record.memory_bytes,
        cpu: record.cpu.clone(),
        image_id: record.image_id,
        volumes: volumes.collect::<Result<_>>()?,
        nics: record.nics.clone(),
        restart_policy: record.restart_policy,
        restart: restart(life),
        isolation: record.isolation,
        identity: record.identity,
        shares_memory_of: life.shares.filter(|_| life.phase.has_machine()),
        machine: machine(record),
        vmm_build: record.vmm_build.clone().filter(|_| life.phase.has_machine()),
        generation: record.generation,
        created_at: record.created_at,
        updated_at: record.updated_at,
        started_at: record.started_at,
    })
}

/// The machine at hand, where the next one is to be another.
fn machine(record: &ServerRecord) -> Option<ServerMachine> {
    let Held { vcpus, memory_bytes, cpu, .. } = record.held.clone();
    let differs = record.life.phase.has_machine() && record.is_changed();
    differs.then_some(ServerMachine { vcpus, memory_bytes, cpu })
}

/// The latest start by the restart policy, while that says something about what the server does.
pub(super) fn restart(life: &Life) -> Option<Restart> {
    let at = match life.phase {
        Phase::Waiting { until_ms, .. } => Some(Time::from_unix_ms(until_ms)),
        _ => None,
    };
    (life.failures > 0 && !life.is_off()).then_some(Restart { attempt: life.failures, at })
}

/// Actions that would change something now.
pub(super) fn allowed_actions(record: &ServerRecord) -> Vec<String> {
    let phase = &record.life.phase;
    let settle = (phase.is_in_doubt() || phase.is_arriving()).then_some("settle-migration");
    let limit =
        (phase.is_moving() && !phase.is_arriving() && !phase.is_in_doubt()).then_some("limit-migration");
    let actions = record.life.allowed_actions(record.context()).into_iter();
    actions.chain(settle).chain(limit).map(str::to_owned).collect()
}

/// A state as it stands in JSON.
pub(super) fn state_text(record: &ServerRecord) -> String {
    serde_json::to_value(record.life.phase.state())
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}
