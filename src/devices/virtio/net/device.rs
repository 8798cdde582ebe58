//! The interface as its transport sees it: features, configuration, and a thread per driver. The work is in `service`.
use std::io;
use std::sync::Arc;

use super::backend::Link;
use super::receive::Receiver;
use super::service::{RECEIVE, Service, Shared, TRANSMIT};
use super::transmit::Transmitter;
use super::{NetControl, NetStats, config};
use crate::limiter::{LimitsSlot, RateLimits, Throttle};
use crate::limits::NET_QUEUE_SIZE;
use crate::state::{Numbers, Refused};
use crate::virtio::{
    ActivateError, Active, Begin, Kick, QueueWiring, VirtioDevice, Wiring, Worker, WorkerOptions,
};

/// The device's number in virtio 1.2, section 5.
const DEVICE_TYPE: u32 = 1;

/// What an interface is made of.
#[derive(Debug)]
pub struct NetOptions {
    /// What operators call it, such as `nic0`.
    pub name: String,
    /// The tap.
    pub link: Link,
    /// The address the guest reads.
    pub mac: [u8; 6],
    /// The largest packet the guest should send, in bytes.
    pub mtu: u16,
    /// Limits on what the guest receives.
    pub rx_limits: RateLimits,
    /// Limits on what the guest sends.
    pub tx_limits: RateLimits,
    /// Where to count.
    pub stats: Arc<NetStats>,
}

/// An interface as its transport sees it.
#[derive(Debug)]
pub struct Net {
    name: String,
    link: Link,
    mac: [u8; 6],
    mtu: u16,
    control: NetControl,
    stats: Arc<NetStats>,
}

impl Net {
    /// An interface that serves nobody yet.
    pub fn new(options: NetOptions) -> io::Result<Net> {
        let NetOptions { name, link, mac, mtu, rx_limits, tx_limits, stats } = options;
        let rx = Arc::new(LimitsSlot::new(rx_limits)?);
        let tx = Arc::new(LimitsSlot::new(tx_limits)?);
        Ok(Net { name, link, mac, mtu, control: NetControl { rx, tx }, stats })
    }

    /// The way to change it while it works.
    pub fn control(&self) -> NetControl {
        self.control.clone()
    }

    fn service(
        &self,
        receive: QueueWiring,
        transmit: QueueWiring,
        shared: Shared,
        begin: &Begin,
    ) -> io::Result<Service> {
        // A tap remembers, so each driver's offloads are set, also the lack of them.
        shared.link.set_offloads(config::offloads(shared.features))?;
        let shared = Arc::new(shared);
        let throttle = |slot, at| -> io::Result<Throttle> {
            let mut throttle = Throttle::new(Arc::clone(slot))?;
            if let Some(limits) = begin.limits(at) {
                throttle.restore(limits);
            }
            Ok(throttle)
        };
        let (rx, tx) = (throttle(&self.control.rx, 0)?, throttle(&self.control.tx, 1)?);
        let transmit_kick = Arc::clone(&transmit.kick);
        let receiver = Receiver::new(receive, rx, Arc::clone(&shared));
        let transmitter = Transmitter::new(transmit, tx, Arc::clone(&shared));
        Ok(Service::new(receiver, transmitter, transmit_kick, shared))
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        config::features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &[NET_QUEUE_SIZE, NET_QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&config::space(self.mac, self.mtu), offset, data);
    }

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// The address and the MTU are in the specification; a packet that waits for buffers is one that is still on the
    /// wire, and goes where the tap goes.
    fn save(&self) -> Numbers {
        Numbers::default()
    }

    fn restore(&mut self, state: &Numbers) -> Result<(), Refused> {
        state.exactly(&self.name, []).map(|[]| ())
    }

    fn activate(&mut self, wiring: Wiring) -> Result<Box<dyn Active>, ActivateError> {
        let Wiring { memory, features, queues, signals, threads, begin } = wiring;
        let (mut receive, mut transmit) = (None, None);
        for queue in queues {
            match queue.index {
                RECEIVE => receive = Some(queue),
                TRANSMIT => transmit = Some(queue),
                _ => {}
            }
        }
        let receive = receive.ok_or(ActivateError::QueueMissing { index: RECEIVE })?;
        let transmit = transmit.ok_or(ActivateError::QueueMissing { index: TRANSMIT })?;
        let kick = |queue: &QueueWiring| Kick { index: queue.index, event: Arc::clone(&queue.kick) };
        let kicks = vec![kick(&receive), kick(&transmit)];
        let stats = Arc::clone(&self.stats);
        let shared = Shared {
            link: self.link.clone(),
            memory,
            features,
            mtu: self.mtu,
            stats,
            signals: Arc::clone(&signals),
        };
        let service = self.service(receive, transmit, shared, &begin).map_err(ActivateError::Backend)?;
        let device = self.name.clone();
        let options = WorkerOptions { kind: "net", device, kicks, signals, threads, begin };
        Ok(Box::new(Worker::start(options, Box::new(service))?))
    }
}
