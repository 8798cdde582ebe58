//! A virtio function as data: what it was when it was paused, and how another takes it over. Whoever kept it may have
//! changed it, so each part is checked as if its driver had never followed a rule.
use serde::{Deserialize, Serialize};

use super::{State, VirtioPci};
use crate::bus::locked;
use crate::pci::msix::MsixState;
use crate::state::{Numbers, Refused};
use crate::virtio::device::{Begin, Signals, Stand};

/// A function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    /// What operators call the device.
    pub device: String,
    /// Its number in virtio 1.2, section 5.
    pub device_type: u32,
    /// Configuration space, as far as the guest may write it.
    pub config: Vec<u8>,
    /// Vectors.
    pub msix: MsixState,
    /// Common configuration.
    pub common: CommonState,
    /// What the device tells its driver.
    pub signals: SignalsState,
    /// Where it stood, if it served a driver and was not broken.
    pub stand: Option<Stand>,
    /// The device's own.
    pub own: Numbers,
}

/// Registers of the common configuration structure (virtio 1.2, section 4.1.4.3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommonState {
    /// Feature bits the driver has written.
    pub features: u64,
    /// It wrote one that has no number here.
    pub unknown_features: bool,
    /// device_feature_select.
    pub device_select: u32,
    /// driver_feature_select.
    pub driver_select: u32,
    /// device_status without DEVICE_NEEDS_RESET.
    pub status: u8,
    /// queue_select.
    pub queue_select: u16,
    /// By queue.
    pub queues: Vec<QueueState>,
}

/// Registers of one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// queue_size.
    pub size: u16,
    /// queue_enable.
    pub enabled: bool,
    /// Descriptor table, driver area, device area.
    pub addresses: [u64; 3],
}

/// What others than the driver change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalsState {
    /// Vector of configuration changes, 0xFFFF for none.
    pub config_vector: u16,
    /// Vector by queue.
    pub queue_vectors: Vec<u16>,
    /// Interrupt status.
    pub isr: u8,
    /// config_generation.
    pub generation: u8,
    /// DEVICE_NEEDS_RESET.
    pub broken: bool,
}

impl VirtioPci {
    /// The function as it stands. It has been paused and nothing is in flight; anything else is told.
    pub fn save(&self) -> Result<FunctionState, Refused> {
        let state = locked(&self.state);
        let name = state.device.name();
        if !state.held || state.ending.is_some() {
            return Err(Refused::new(name, "it is not paused"));
        }
        let mut signals = self.signals.save();
        // The read that shows a change may come only after the restore.
        if state.told.is_some_and(|told| told != super::image_of(state.device.as_ref())) {
            signals.generation = signals.generation.wrapping_add(1);
        }
        let stand = match &state.active {
            Some(active) if !signals.broken => {
                Some(active.stand().ok_or_else(|| Refused::new(name, "requests are in flight"))?)
            }
            _ => None,
        };
        Ok(FunctionState {
            device: name.to_owned(),
            device_type: state.device.device_type(),
            config: state.config.save(),
            msix: self.signals.msix().save(),
            common: state.common.save(),
            signals,
            stand,
            own: state.device.save(),
        })
    }

    /// Takes over what another function was, into one that no guest has touched. It is paused then, like the machine
    /// it belongs to. After an error the function is of no use.
    pub fn restore(&self, saved: &FunctionState) -> Result<(), Refused> {
        let mut state = locked(&self.state);
        let name = state.device.name().to_owned();
        let refuse = |detail: String| Err(Refused::new(&name, detail));
        if saved.device_type != state.device.device_type() || saved.device != name {
            let device: String = saved.device.chars().take(32).collect();
            return refuse(format!("{device:?} of type {} was saved in its place", saved.device_type));
        }
        if state.active.is_some() {
            return refuse("it serves a driver already".to_owned());
        }
        let is_served = saved.common.status & super::common::DRIVER_OK != 0 && !saved.signals.broken;
        if is_served != saved.stand.is_some() {
            return refuse("where its queues stand is told exactly when it serves a driver".to_owned());
        }
        state.held = true;
        state.config.restore(&name, &saved.config)?;
        state.common.restore(&name, &saved.common)?;
        state.device.restore(&saved.own)?;
        state.told = Some(super::image_of(state.device.as_ref()));
        self.signals.restore(&saved.signals)?;
        self.configured(&mut state);
        self.signals.msix().restore(&name, &saved.msix, state.config.msix_control())?;
        self.signals.set_running(state.common.is_driver_ok());
        match &saved.stand {
            Some(stand) => self.go_on(&mut state, &name, stand),
            None => Ok(()),
        }
    }

    /// Tells the driver that the function belongs to another machine now, after [`VirtioPci::restore`]: whatever its
    /// configuration says may have changed (virtio 1.2, section 4.1.4.3.1), such as an address or a size.
    pub fn tell_new_owner(&self) {
        self.signals.count_change();
        self.signals.config_changed();
    }

    fn go_on(&self, state: &mut State, name: &str, stand: &Stand) -> Result<(), Refused> {
        let enabled = (0..).zip(state.common.queues()).filter(|(_, queue)| queue.enabled);
        if !enabled.map(|(index, _)| index).eq(stand.queues.iter().map(|(index, _)| *index)) {
            return Err(Refused::new(name, "it is not told where each enabled queue stands"));
        }
        self.activate(state, Begin::Restored(stand.clone())).map_err(|detail| Refused::new(name, detail))
    }
}
