//! A new server: what was asked for is checked, what is left out is filled in, everything it needs is recorded
//! in one transaction. Called by the facade, which commits it or, for a plan, takes it back.
use model::limits as bounds;
use model::operation::{Operation, Resource};
use model::server::{CpuTemplate, CreateNic, CreateServer, DiskLimits, NicLimits, Rate, ServerNic, Wanted};
use model::{Code, FieldError, Labels, Name, OperationId, ServerId, Time};

use super::advance;
use super::lifecycle::Life;
use super::record::{self, Disk, Held, ServerRecord};
use super::registry::Workshop;
use crate::call::Actor;
use crate::cpu;
use crate::error::{Error, Result, size};
use crate::images::Images;
use crate::network::{Networks, Reservation};
use crate::operations::{self, NewOperation};
use crate::snapshots::Snapshots;
use crate::store::{Tx, records};
use crate::volumes::NewVolume;

/// Memory of a server whose creator names none and whose image needs less, in bytes.
const MEMORY_BYTES_DEFAULT: u64 = 512 << 20;

/// What volumes are counted in, in bytes: the size of a page.
pub(super) const VOLUME_STEP: u64 = 4096;

/// Records a new server and the operation that makes it.
pub(super) fn server(
    tx: &Tx<'_>,
    workshop: &Workshop,
    spec: CreateServer,
    actor: &Actor,
) -> Result<(Operation, ServerRecord)> {
    check(&spec)?;
    let (image, snapshot) = match (&spec.image, &spec.snapshot) {
        (Some(image), None) => (Images::ready(tx, image)?, None),
        (None, Some(snapshot)) => {
            let snapshot = Snapshots::ready(tx, snapshot)?.shown;
            (records::one(tx, snapshot.image_id.0)?, Some(snapshot))
        }
        (None, None) => {
            return Err(Error::invalid("/image", "missing", "say which image, or which snapshot"));
        }
        (Some(_), Some(_)) => {
            let detail = "a server is made from an image or from a snapshot, not from both";
            return Err(Error::invalid("/snapshot", "conflict", detail));
        }
    };
    let memory_bytes = memory(&spec, image.memory_bytes_min)?;
    let id = ServerId::new();
    let mut disks = Vec::new();
    // The first disk of a snapshot stands in for the image's. A snapshot of a server without disks has none.
    let source_bytes = match &snapshot {
        Some(snapshot) => snapshot.volumes.first().map_or(0, |disk| disk.size_bytes),
        None => image.disk_bytes,
    };
    if let Some(size_bytes) = disk_size(&spec, source_bytes)? {
        let volume = workshop.volumes.create(
            tx,
            NewVolume {
                is_clone: false,
                name: volume_name(&spec.name, id)?,
                labels: Labels::default(),
                size_bytes,
                image_id: (image.disk_bytes > 0).then_some(image.id),
                snapshot_id: snapshot.as_ref().filter(|_| source_bytes > 0).map(|snapshot| snapshot.id),
                server_id: Some(id),
            },
        )?;
        disks.push(Disk { volume_id: volume.id, cache: spec.cache, limits: spec.disk_limits });
    }
    let operation_id = OperationId::new();
    let now = Time::now();
    let nics = spec.nics.clone().unwrap_or_else(|| vec![CreateNic::default()]);
    let mut record = ServerRecord {
        id,
        name: spec.name,
        description: spec.description,
        labels: spec.labels,
        external_ref: spec.external_ref,
        life: Life::new(operation_id, spec.start),
        vcpus: spec.vcpus,
        memory_bytes,
        cpu: spec.cpu,
        held: Held::default(),
        image_id: image.id,
        default_user: image.default_user,
        disks,
        nics: Vec::new(),
        ssh_keys: spec.ssh_keys,
        user_data: spec.user_data,
        restart_policy: spec.restart_policy,
        isolation: spec.isolation,
        sandbox: None,
        cage: None,
        identity: None,
        vmm_build: None,
        descent: 0,
        generation: 1,
        created_at: now,
        updated_at: now,
        started_at: None,
    };
    record.nics = reserve(tx, &workshop.networks, &record, nics)?;
    if spec.start {
        before_start(workshop, &record)?;
        workshop.capacity.admit(tx, &mut record)?;
    }
    record::insert(tx, &record)?;
    let mut resources = vec![Resource::Server(id)];
    resources.extend(record.disks.iter().map(|disk| Resource::Volume(disk.volume_id)));
    let operation = operations::accept_as(
        tx,
        operation_id,
        NewOperation { kind: "server.create", resources, actor, cancellable: true },
    )?;
    advance::announce(tx, &record, "server.created", Some(actor))?;
    Ok((operation, record))
}

/// What can be known before a start: whether VMMs can be started and every interface can be plugged.
pub(super) fn before_start(workshop: &Workshop, record: &ServerRecord) -> Result<()> {
    workshop.launcher.check()?;
    record.nics.iter().try_for_each(|nic| workshop.networks.check_ready(nic.network_id))
}

pub(super) fn reserve(
    tx: &Tx<'_>,
    networks: &Networks,
    record: &ServerRecord,
    wanted: Vec<CreateNic>,
) -> Result<Vec<ServerNic>> {
    let mut nics = Vec::new();
    for (index, nic) in (0u8..).zip(wanted) {
        let network = Networks::resolve(tx, nic.network.as_deref()).map_err(|cause| match cause.code {
            Code::NotFound => Error::invalid(format!("/nics/{index}/network"), "not_found", cause.detail),
            _ => cause,
        })?;
        let starts = record.life.wanted == Wanted::Running;
        let promised = if starts { networks.promise(tx, network.id) } else { None };
        let mac = Networks::free_mac(tx, promised, (record.id, index))?.to_string();
        let reservation =
            Reservation { server: record.id, name: &record.name, index, mac: &mac, ipv4: nic.ipv4 };
        let ipv4 = Networks::reserve(tx, network.id, reservation)?;
        nics.push(ServerNic { network_id: network.id, index, mac, ipv4, limits: nic.limits });
    }
    Ok(nics)
}

fn memory(spec: &CreateServer, least: u64) -> Result<u64> {
    let memory_bytes = spec
        .memory_bytes
        .unwrap_or_else(|| least.max(MEMORY_BYTES_DEFAULT).next_multiple_of(bounds::MEMORY_STEP_BYTES));
    if memory_bytes < least {
        let detail = format!("the image needs at least {}", size(least));
        return Err(Error::invalid("/memory_bytes", "too_small", detail));
    }
    Ok(memory_bytes)
}

/// Size of the root volume; nothing for an image that runs without one.
fn disk_size(spec: &CreateServer, image_bytes: u64) -> Result<Option<u64>> {
    match spec.disk_bytes {
        Some(size_bytes) if size_bytes < image_bytes => {
            let detail = format!(
                "what it is made from has a disk of {}; the volume cannot be smaller",
                size(image_bytes)
            );
            Err(Error::invalid("/disk_bytes", "too_small", detail))
        }
        Some(size_bytes) => Ok(Some(size_bytes)),
        None if image_bytes == 0 => Ok(None),
        None => Ok(Some(image_bytes.next_multiple_of(VOLUME_STEP).max(bounds::VOLUME_BYTES_MIN))),
    }
}

/// Unique whatever earlier servers of that name have left behind.
pub(super) fn volume_name(server: &Name, id: ServerId) -> Result<Name> {
    let digits = id.0.simple().to_string();
    let tail = format!("-root-{}", &digits[digits.len() - 8..]);
    let mut head = server.as_str();
    head = &head[..head.len().min(bounds::NAME_CHARS_MAX - tail.len())];
    format!("{head}{tail}").parse().map_err(|cause| Error::internal("a volume cannot be named", cause))
}

fn check(spec: &CreateServer) -> Result<()> {
    let mut faults = Faults::default();
    faults.machine(Some(spec.vcpus), spec.memory_bytes, Some(&spec.cpu));
    if let Some(size_bytes) = spec.disk_bytes {
        let sound = (bounds::VOLUME_BYTES_MIN..=bounds::VOLUME_BYTES_MAX).contains(&size_bytes)
            && size_bytes.is_multiple_of(VOLUME_STEP);
        faults.unless(sound, "/disk_bytes", "out_of_range", || {
            format!(
                "must be a multiple of {} between {} and {}",
                size(VOLUME_STEP),
                size(bounds::VOLUME_BYTES_MIN),
                size(bounds::VOLUME_BYTES_MAX)
            )
        });
    }
    faults.disk_limits("/disk_limits", &spec.disk_limits);
    let nics = spec.nics.as_deref().unwrap_or_default();
    faults.unless(nics.len() <= bounds::NICS_MAX, "/nics", "too_many", || {
        format!("has {} interfaces; {} are possible", nics.len(), bounds::NICS_MAX)
    });
    for (at, nic) in nics.iter().enumerate().take(bounds::NICS_MAX) {
        faults.nic_limits(&format!("/nics/{at}/limits"), &nic.limits);
    }
    faults.keys(&spec.ssh_keys);
    let data_bytes = spec.user_data.as_ref().map_or(0, String::len);
    faults.unless(data_bytes <= bounds::USER_DATA_BYTES_MAX, "/user_data", "too_long", || {
        format!("has {data_bytes} bytes; {} are possible", bounds::USER_DATA_BYTES_MAX)
    });
    faults.description(&spec.description);
    faults.external_ref(spec.external_ref.as_deref());
    faults.end()
}

/// Collects what is wrong, so that a caller hears all of it at once.
#[derive(Default)]
pub(super) struct Faults(Vec<FieldError>);

impl Faults {
    pub(super) fn unless(&mut self, sound: bool, pointer: &str, code: &str, detail: impl FnOnce() -> String) {
        if !sound {
            self.0.push(FieldError { pointer: pointer.to_owned(), code: code.to_owned(), detail: detail() });
        }
    }

    pub(super) fn machine(
        &mut self,
        vcpus: Option<u8>,
        memory_bytes: Option<u64>,
        cpu: Option<&CpuTemplate>,
    ) {
        let sound = vcpus.is_none_or(|vcpus| (1..=bounds::VCPUS_MAX).contains(&vcpus));
        self.unless(sound, "/vcpus", "out_of_range", || {
            format!("must be between 1 and {}", bounds::VCPUS_MAX)
        });
        let sound = memory_bytes.is_none_or(|bytes| {
            (bounds::MEMORY_BYTES_MIN..=bounds::MEMORY_BYTES_MAX).contains(&bytes)
                && bytes.is_multiple_of(bounds::MEMORY_STEP_BYTES)
        });
        self.unless(sound, "/memory_bytes", "out_of_range", || {
            format!(
                "must be a multiple of {} between {} and {}",
                size(bounds::MEMORY_STEP_BYTES),
                size(bounds::MEMORY_BYTES_MIN),
                size(bounds::MEMORY_BYTES_MAX)
            )
        });
        let fault = cpu.and_then(|cpu| cpu::template(cpu).fault());
        self.unless(fault.is_none(), "/cpu/features", "not_valid", || fault.unwrap_or_default());
    }

    pub(super) fn description(&mut self, text: &str) {
        let sound = text.chars().count() <= bounds::DESCRIPTION_CHARS_MAX;
        self.unless(sound, "/description", "too_long", || {
            format!("must have at most {} characters", bounds::DESCRIPTION_CHARS_MAX)
        });
    }

    pub(super) fn external_ref(&mut self, reference: Option<&str>) {
        let Some(reference) = reference else { return };
        let sound = (1..=bounds::EXTERNAL_REF_CHARS_MAX).contains(&reference.chars().count());
        self.unless(sound, "/external_ref", "length", || {
            format!("must have 1 to {} characters", bounds::EXTERNAL_REF_CHARS_MAX)
        });
    }

    pub(super) fn disk_limits(&mut self, pointer: &str, limits: &DiskLimits) {
        self.rate(pointer, "bandwidth_bytes", limits.bandwidth_bytes);
        self.rate(pointer, "operations", limits.operations);
    }

    pub(super) fn nic_limits(&mut self, pointer: &str, limits: &NicLimits) {
        self.rate(pointer, "rx_bytes", limits.rx_bytes);
        self.rate(pointer, "rx_packets", limits.rx_packets);
        self.rate(pointer, "tx_bytes", limits.tx_bytes);
        self.rate(pointer, "tx_packets", limits.tx_packets);
    }

    fn rate(&mut self, pointer: &str, name: &str, rate: Option<Rate>) {
        let Some(rate) = rate else { return };
        let pointer = format!("{pointer}/{name}");
        self.unless(rate.per_second > 0, &format!("{pointer}/per_second"), "out_of_range", || {
            "must be at least 1; leave the limit out for none".to_owned()
        });
        self.unless(rate.burst != Some(0), &format!("{pointer}/burst"), "out_of_range", || {
            "must be at least 1; leave it out to be as per_second".to_owned()
        });
    }

    pub(super) fn keys(&mut self, keys: &[String]) {
        self.unless(keys.len() <= bounds::SSH_KEYS_MAX, "/ssh_keys", "too_many", || {
            format!("has {} keys; {} are possible", keys.len(), bounds::SSH_KEYS_MAX)
        });
        for (at, key) in keys.iter().enumerate().take(bounds::SSH_KEYS_MAX) {
            let sound = key.len() <= bounds::SSH_KEY_BYTES_MAX
                && !key.chars().any(char::is_control)
                && key.split_ascii_whitespace().count() >= 2;
            self.unless(sound, &format!("/ssh_keys/{at}"), "not_a_key", || {
                format!(
                    "must be one line of a public key file, such as `ssh-ed25519 AAAA… name`, of at most {} bytes",
                    bounds::SSH_KEY_BYTES_MAX
                )
            });
        }
    }

    pub(super) fn end(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::all_invalid(self.0)) }
    }
}
