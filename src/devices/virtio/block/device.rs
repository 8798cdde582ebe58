//! The disk as its transport sees it: features, configuration, and a thread per driver. The work is in `service`.
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_blk::*;

use super::backend::Disk;
use super::config::{self, WRITEBACK_OFFSET, bit};
use super::request::{IDENTITY_BYTES, Terms};
use super::service::{Caching, Service, ServiceOptions};
use super::state::State;
use super::{Access, BlockControl, BlockStats, CacheMode};
use crate::limiter::{LimiterState, LimitsSlot, RateLimits, Throttle};
use crate::limits::BLOCK_QUEUE_SIZE;
use crate::state::{Numbers, Refused};
use crate::virtio::{
    ActivateError, Active, Kick, QueueWiring, Signals, VirtioDevice, Wiring, Worker, WorkerOptions,
};

/// The device's number in virtio 1.2, section 5.
const DEVICE_TYPE: u32 = 2;

/// What a disk is made of.
#[derive(Debug)]
pub struct BlockOptions {
    /// What operators call it, such as `disk0`.
    pub name: String,
    /// The file.
    pub disk: Disk,
    /// What a completed write promises.
    pub cache: CacheMode,
    /// What the guest reads as identity; bytes beyond the 20th are cut off.
    pub serial: String,
    /// Limits on what the guest may ask.
    pub limits: RateLimits,
    /// Where to count.
    pub stats: Arc<BlockStats>,
}

/// A disk as its transport sees it.
#[derive(Debug)]
pub struct Block {
    name: String,
    disk: Disk,
    cache: CacheMode,
    identity: [u8; IDENTITY_BYTES],
    limits: Arc<LimitsSlot>,
    stats: Arc<BlockStats>,
    /// The configuration's `writeback`, which the guest may change while it runs.
    writeback: Arc<AtomicBool>,
}

impl Block {
    /// A disk that serves nobody yet.
    pub fn new(options: BlockOptions) -> io::Result<Block> {
        let BlockOptions { name, disk, cache, serial, limits, stats } = options;
        let mut identity = [0; IDENTITY_BYTES];
        for (to, from) in identity.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let limits = Arc::new(LimitsSlot::new(limits)?);
        let writeback = Arc::new(AtomicBool::new(cache == CacheMode::Writeback));
        Ok(Block { name, disk, cache, identity, limits, stats, writeback })
    }

    /// The way to change it while it works.
    pub fn control(&self) -> BlockControl {
        BlockControl(Arc::clone(&self.limits))
    }

    fn may_change_cache(&self) -> bool {
        self.features() & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0
    }

    /// When writes have to be durable for a driver that agreed to `features`.
    pub(super) fn caching(&self, features: u64) -> Caching {
        let (flush, change) = (bit(VIRTIO_BLK_F_FLUSH), bit(VIRTIO_BLK_F_CONFIG_WCE));
        Caching {
            // A driver that knows no flush would lose what is only cached (virtio 1.2, section 5.2.6.2).
            always_durable: self.cache == CacheMode::Writethrough || features & (flush | change) == 0,
            follows_guest: features & change != 0,
            writeback: Arc::clone(&self.writeback),
            initial: self.cache == CacheMode::Writeback,
        }
    }

    pub(super) fn service(
        &self,
        wiring: QueueWiring,
        signals: Arc<dyn Signals>,
        features: u64,
        limits: Option<LimiterState>,
    ) -> io::Result<Service> {
        let mut throttle = Throttle::new(Arc::clone(&self.limits))?;
        if let Some(limits) = limits {
            throttle.restore(limits);
        }
        Ok(Service::new(ServiceOptions {
            wiring,
            lease: self.disk.lease()?,
            throttle,
            terms: Terms { sectors: self.disk.sectors(), access: self.disk.access(), features },
            identity: self.identity,
            stats: Arc::clone(&self.stats),
            signals,
            caching: self.caching(features),
        }))
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        config::features(self.disk.access(), self.cache)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[BLOCK_QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let writeback = self.writeback.load(Ordering::Relaxed);
        config::read(&config::space(self.disk.sectors(), self.disk.access(), writeback), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let ([value @ (0 | 1)], WRITEBACK_OFFSET) = (data, offset)
            && self.may_change_cache()
        {
            self.writeback.store(*value == 1, Ordering::Relaxed);
        }
    }

    fn save(&self) -> Numbers {
        State { sectors: self.disk.sectors(), writeback: self.writeback.load(Ordering::Relaxed) }.numbers()
    }

    fn restore(&mut self, state: &Numbers) -> Result<(), Refused> {
        let State { sectors, writeback } = State::read(&self.name, state)?;
        // What its driver may only read was never its own, and may be another's for whom the machine has become.
        if sectors != self.disk.sectors() && self.disk.access() == Access::ReadWrite {
            let detail =
                format!("it had {sectors} sectors when it was saved and has {} here", self.disk.sectors());
            return Err(Refused::new(&self.name, detail));
        }
        let initial = self.cache == CacheMode::Writeback;
        if writeback != initial && !self.may_change_cache() {
            return Err(Refused::new(&self.name, "its cache was changed although it cannot be"));
        }
        self.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }

    /// A driver that could switch the cache on but never flush it finds it off (virtio 1.2, section 5.2.5.2).
    fn negotiated(&self, features: u64) {
        let (flush, change) = (bit(VIRTIO_BLK_F_FLUSH), bit(VIRTIO_BLK_F_CONFIG_WCE));
        let cannot_flush = features & change != 0 && features & flush == 0;
        self.writeback.store(self.cache == CacheMode::Writeback && !cannot_flush, Ordering::Relaxed);
    }

    fn activate(&mut self, wiring: Wiring) -> Result<Box<dyn Active>, ActivateError> {
        let Wiring { features, queues, signals, threads, begin, .. } = wiring;
        let queue = queues.into_iter().find(|queue| queue.index == 0);
        let queue = queue.ok_or(ActivateError::QueueMissing { index: 0 })?;
        let kicks = vec![Kick { index: 0, event: Arc::clone(&queue.kick) }];
        let service = self.service(queue, Arc::clone(&signals), features, begin.limits(0));
        let service = service.map_err(ActivateError::Backend)?;
        let device = self.name.clone();
        let options = WorkerOptions { kind: "block", device, kicks, signals, threads, begin };
        Ok(Box::new(Worker::start(options, Box::new(service))?))
    }
}
