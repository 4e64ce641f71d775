python distill/DATM.py --cfg=configs/MiniFashion/ConvIN/IPC1.yaml \
      --dataset=ImageFolder --model=ConvNetW32 --zca=False --res=32 \
      --data_path=photos5 \
      --buffer_path=experts/photos5 --ipc=1 \
      --lr_teacher=0.003 --syn_steps=20 --expert_epochs=3 --min_start_epoch=0 \
      --max_start_epoch=8 --threshold=1.5 --epoch_eval_train=1000 \
      --lr_img=800.0 --lr_y=7.0
