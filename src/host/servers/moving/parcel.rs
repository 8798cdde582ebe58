//! A server's record as it travels: everything that is to be the same on the other host, and nothing that a host gives
//! anew. What comes is judged as a caller's words are: another host may have been taken over.
use model::image::Image;
use model::server::{CacheMode, CpuTemplate, DiskLimits, Isolation, NicLimits, RestartPolicy, ServerNic};
use model::snapshot::GuestIdentity;
use model::volume::{Volume, VolumeFormat, VolumeState};
use model::{Labels, Name, ServerId, Time};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use wire::peer::OfferedCpu;

use crate::error::Result;
use crate::network::Networks;
use crate::network::mac::Mac;
use crate::servers::create::{Faults, VOLUME_STEP};
use crate::servers::lifecycle::{Back, Life, Phase, Saved, SavedOf};
use crate::servers::record::{Disk, Held, ServerRecord};
use crate::store::records;
use crate::volumes::overlay;

/// A server on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Packed {
    pub(crate) id: ServerId,
    pub(crate) name: Name,
    description: String,
    labels: Labels,
    pub(crate) external_ref: Option<String>,
    pub(crate) vcpus: u8,
    pub(crate) memory_bytes: u64,
    pub(crate) cpu: CpuTemplate,
    pub(crate) disks: Vec<PackedDisk>,
    pub(crate) nics: Vec<PackedNic>,
    ssh_keys: Vec<String>,
    user_data: Option<String>,
    restart_policy: RestartPolicy,
    isolation: Isolation,
    /// Of a clone: whether its guest has become another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    identity: Option<GuestIdentity>,
    /// How many clones of clones it is from a server that booted: its seed's size goes by it, which a guest knows that comes
    /// along.
    #[serde(default, skip_serializing_if = "is_zero")]
    descent: u32,
    /// What it did.
    back: Back,
    /// By what its memory is known, if it comes along.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) saved: Option<Saved>,
    /// Number of its latest machine.
    run: u64,
    generation: u64,
    created_at: Time,
    started_at: Option<Time>,
}

fn is_zero(descent: &u32) -> bool {
    *descent == 0
}

/// A disk without its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PackedDisk {
    pub(crate) volume: Volume,
    cache: CacheMode,
    limits: DiskLimits,
}

/// An interface, with the name that its network has on each host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PackedNic {
    pub(crate) network: String,
    pub(crate) ipv4_cidr: String,
    pub(crate) mac: String,
    pub(crate) ipv4: Ipv4Addr,
    limits: NicLimits,
}

/// A volume as it comes: all of it in its own file, whatever it was made from.
fn whole(volume: Volume) -> Volume {
    Volume { filled_by: volume.filled_by.map(overlay::whole), ..volume }
}

/// What a count that only grows by one is below: it is a JSON number that every reader can hold.
const COUNT_MAX: u64 = 1 << 53;

/// Longest reason why a server is off, in bytes.
const WHY_BYTES_MAX: usize = 4096;

impl Packed {
    /// What of a server travels.
    pub(crate) fn of(connection: &Connection, record: ServerRecord) -> Result<Packed> {
        // Every member is named, so that one that is new is thought about here.
        let ServerRecord {
            id,
            name,
            description,
            labels,
            external_ref,
            life,
            vcpus,
            memory_bytes,
            cpu,
            held: _,
            image_id: _,
            // The target's image says it, which is the same.
            default_user: _,
            disks,
            nics,
            ssh_keys,
            user_data,
            restart_policy,
            isolation,
            // Those are said of a VMM that is gone.
            sandbox: _,
            cage: _,
            vmm_build: _,
            identity,
            descent,
            generation,
            created_at,
            updated_at: _,
            started_at,
        } = record;
        let disks = disks.into_iter().map(|Disk { volume_id, cache, limits }| {
            Ok(PackedDisk { volume: whole(records::one(connection, volume_id.0)?), cache, limits })
        });
        let nics = nics.into_iter().map(|ServerNic { network_id, index: _, mac, ipv4, limits }| {
            let network: model::network::Network = records::one(connection, network_id.0)?;
            Ok(PackedNic {
                network: network.name.to_string(),
                ipv4_cidr: network.ipv4_cidr,
                mac,
                ipv4,
                limits,
            })
        });
        let back = match life.phase {
            Phase::Moving { back, .. } => back,
            Phase::Failed { why } => Back::Failed { why },
            Phase::Hibernated { why } => Back::Hibernated { why },
            Phase::Running { .. } => Back::Running,
            Phase::Paused { .. } => Back::Paused,
            Phase::Stopped { why } => Back::Stopped { why },
            _ => Back::Stopped { why: None },
        };
        Ok(Packed {
            id,
            name,
            description,
            labels,
            external_ref,
            vcpus,
            memory_bytes,
            cpu,
            disks: disks.collect::<Result<_>>()?,
            nics: nics.collect::<Result<_>>()?,
            ssh_keys,
            user_data,
            restart_policy,
            isolation,
            identity,
            descent,
            back,
            saved: life.saved,
            run: life.run,
            generation,
            created_at,
            started_at,
        })
    }

    /// Whether its machine comes with it.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.back, Back::Running | Back::Paused)
    }

    /// Checks everything that a caller's words are checked for. Fails with `invalid`.
    pub(crate) fn check(&self) -> Result<()> {
        use model::limits as bounds;
        let mut faults = Faults::default();
        faults.machine(Some(self.vcpus), Some(self.memory_bytes), Some(&self.cpu));
        faults.description(&self.description);
        faults.external_ref(self.external_ref.as_deref());
        faults.keys(&self.ssh_keys);
        let data_bytes = self.user_data.as_ref().map_or(0, String::len);
        faults.unless(data_bytes <= bounds::USER_DATA_BYTES_MAX, "/user_data", "too_long", || {
            format!("has {data_bytes} bytes; {} are possible", bounds::USER_DATA_BYTES_MAX)
        });
        faults.unless(self.nics.len() <= bounds::NICS_MAX, "/nics", "too_many", || {
            format!("has {} interfaces; {} are possible", self.nics.len(), bounds::NICS_MAX)
        });
        for nic in self.nics.iter().take(bounds::NICS_MAX) {
            faults.nic_limits("/nics", &nic.limits);
            faults.unless(Mac::is_of_some_server(&nic.mac), "/nics", "not_valid", || {
                format!("{:?} is no hardware address that a host gives a server", nic.mac)
            });
        }
        for disk in &self.disks {
            let size_bytes = disk.volume.size_bytes;
            let sound = (bounds::VOLUME_BYTES_MIN..=bounds::VOLUME_BYTES_MAX).contains(&size_bytes)
                && size_bytes.is_multiple_of(VOLUME_STEP)
                && disk.volume.format == VolumeFormat::Raw;
            faults.unless(sound, "/disks", "out_of_range", || {
                format!("a volume of {size_bytes} bytes is none that this host can have")
            });
            faults.disk_limits("/disks", &disk.limits);
        }
        let counts = self.disks.iter().map(|disk| disk.volume.generation).chain([self.generation, self.run]);
        faults.unless(
            counts.into_iter().all(|count| count < COUNT_MAX),
            "/generation",
            "out_of_range",
            || format!("a count is above {COUNT_MAX}"),
        );
        let why = match &self.back {
            Back::Stopped { why } | Back::Hibernated { why } => why.as_ref(),
            Back::Failed { why } => Some(why),
            _ => None,
        };
        let is_short = why.is_none_or(|why| why.code.len() + why.detail.len() <= WHY_BYTES_MAX);
        faults.unless(is_short, "/back", "too_long", || format!("has more than {WHY_BYTES_MAX} bytes"));
        let can_move = match self.back {
            Back::Stopped { .. } | Back::Failed { .. } => self.saved.is_none(),
            Back::Hibernated { .. } => self.saved.is_some_and(|saved| saved.of == SavedOf::Hibernation),
            Back::Running | Back::Paused => self.saved.is_none(),
            Back::Ended(_) => false,
        };
        faults.unless(can_move, "/back", "cannot_move", || "the server cannot move as it is".to_owned());
        faults.end()
    }

    /// The records it becomes on this host, which has `image`. Its volumes are empty yet. `shown` is the
    /// processor that its guest goes on with, if it has a memory.
    pub(crate) fn unpacked(
        self,
        connection: &Connection,
        image: &Image,
        shown: &OfferedCpu,
    ) -> Result<(ServerRecord, Vec<Volume>)> {
        let (id, now) = (self.id, Time::now());
        let is_live = self.is_live();
        let booted_ms = self.started_at.filter(|_| is_live).map(|at| at.unix_ms());
        let goes_on = is_live || self.saved.is_some();
        let (memory_bytes, vcpus) = if is_live { (self.memory_bytes, self.vcpus) } else { (0, 0) };
        let cpu = is_live.then(|| self.cpu.clone());
        let mut held = Held { memory_bytes, vcpus, cpu, ..Held::default() };
        if goes_on {
            held.go_on_with(shown);
        }
        let (mut disks, mut volumes) = (Vec::new(), Vec::new());
        for PackedDisk { volume, cache, limits } in self.disks {
            disks.push(Disk { volume_id: volume.id, cache, limits });
            volumes.push(Volume {
                state: VolumeState::Creating,
                used_bytes: 0,
                image_id: volume.image_id.map(|_| image.id),
                server_id: Some(id),
                updated_at: now,
                ..whole(volume)
            });
        }
        let nics = (0u8..).zip(self.nics).map(|(index, nic)| {
            let network = Networks::resolve(connection, Some(&nic.network))?;
            Ok(ServerNic { network_id: network.id, index, mac: nic.mac, ipv4: nic.ipv4, limits: nic.limits })
        });
        let record = ServerRecord {
            id,
            name: self.name,
            description: self.description,
            labels: self.labels,
            external_ref: self.external_ref,
            life: Life::arriving(self.back, self.run, booted_ms, self.saved),
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            cpu: self.cpu,
            held,
            image_id: image.id,
            default_user: image.default_user.clone(),
            disks,
            nics: nics.collect::<Result<_>>()?,
            ssh_keys: self.ssh_keys,
            user_data: self.user_data,
            restart_policy: self.restart_policy,
            isolation: self.isolation,
            sandbox: None,
            cage: None,
            identity: self.identity,
            vmm_build: None,
            descent: self.descent,
            // Whoever has read it on the other host sees that it has changed.
            generation: self.generation.saturating_add(1),
            created_at: self.created_at,
            updated_at: now,
            started_at: self.started_at,
        };
        Ok((record, volumes))
    }
}
