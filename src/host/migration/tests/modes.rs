//! When the memory of a machine goes, where not everybody can do as asked.
use model::operation::OperationState;
use model::server::{ServerAction, ServerState, StopServer};

use super::live::no_violations;
use super::moves::{Ground, has, listening, waited};
use super::*;
use crate::fake_vmm::Guest;

#[tokio::test]
async fn a_vmm_that_owes_no_memory_sends_all_of_it_first_or_says_so() {
    let ground = Ground::with(ServerState::Running).await;
    let [source, target] = [ground.stages[0].open().await, ground.stages[1].open().await];
    let (id, address) = (ground.server, listening(&target).await);
    // From before there was such a thing.
    ground.stages[0].launch.set_guest(Guest::SettlesNothing);
    for (action, state) in [
        (ServerAction::Stop(StopServer { grace_s: 0 }), ServerState::Stopped),
        (ServerAction::Start, ServerState::Running),
    ] {
        source.servers().act(&Call::by_host(), id, action).await.unwrap();
        stage::until(&source, id, |server| server.state == state).await;
    }
    for (mode, succeeds) in [(MigrationMode::PostCopy, false), (MigrationMode::Auto, true)] {
        let made = ticket(&target, None).await.unwrap().ticket;
        let asked = MigrateServer { mode, ..spec(address, made) };
        let moved = source.migrations().migrate(&Call::by_host(), id, asked).await.unwrap();
        let ended = stage::ended(&source, moved.body.operation.id).await;
        assert_eq!(ended.state == OperationState::Succeeded, succeeds, "{mode:?}: {ended:?}");
        if !succeeds {
            let said = format!("{:?}", ended.error);
            assert!(said.contains("upgrade-vmm") && said.contains("pre_copy"), "{said}");
            stage::until(&source, id, |server| server.state == ServerState::Running).await;
            waited("the target to have nothing of it", async || has(&target, id).await.is_none()).await;
        }
    }
    stage::until(&target, id, |server| server.state == ServerState::Running).await;
    no_violations(&ground);
    for host in [source, target] {
        host.close().await;
    }
}

#[test]
fn memory_is_owed_only_where_it_can_be() {
    use wire::migration::Mode;
    for (mode, where_it_can, elsewhere) in [
        (MigrationMode::Auto, Mode::Auto, Mode::PreCopy),
        (MigrationMode::Live, Mode::Auto, Mode::PreCopy),
        (MigrationMode::PreCopy, Mode::PreCopy, Mode::PreCopy),
    ] {
        let modes = [true, false].map(|may_owe| source::memory_mode(mode, may_owe));
        assert_eq!(modes, [where_it_can, elsewhere], "{mode:?}");
    }
}
